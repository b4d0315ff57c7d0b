"""A store of states changes no text, reads no token twice, and keeps within its limit."""

import multiprocessing
import os
import random
import signal
import time

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from testing import WORDS, word_tokenizer
from transformers import DynamicCache, StoppingCriteria, TextGenerationPipeline, TextIteratorStreamer

from modeling_sumagg.streams import PrefixStore

from .kinds import CONFIGS, KINDS, MAIN_KINDS, VOCAB_SIZE, build, greedy_alone, tiny_model


GREEDY = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}


def store_of(model, tmp_path, place, **kwargs):
    return PrefixStore(model, tmp_path / "states" if place == "folder" else None, **kwargs)


def tokens(length: int, seed: int = 0) -> list[int]:
    draw = random.Random(seed)
    return [draw.randrange(3, VOCAB_SIZE) for _ in range(length)]


@pytest.mark.parametrize("place", ["memory", "folder"])
@pytest.mark.parametrize("kind", MAIN_KINDS)
def test_every_turn_reads_what_is_new_and_writes_the_same_text(kind, place, tmp_path):
    model = tiny_model(kind, torch.float64)
    store = store_of(model, tmp_path, place, segment_length=4)
    text, new = [], 0
    for turn in range(4):
        question = tokens(6, turn)
        text += question
        # The last token of the answer before was written and never read; the last of the prompt is left to `generate`.
        expected_read = len(question) - 1 + (turn > 0)
        before = store.num_tokens_read
        written = store.generate(torch.tensor([text]), **GREEDY)[0].tolist()
        assert written[len(text) :] == greedy_alone(model, tuple(text), 5)
        assert store.num_tokens_read - before == expected_read
        new += len(question)
        text = written
    # The prompt before its last token, the answer before its last, and every fourth token, each once.
    ends = {11 * turn + 5 for turn in range(4)} | {11 * turn + 10 for turn in range(4)} | set(range(4, 44, 4))
    assert len(store) == len(ends)


@pytest.mark.parametrize("kind", MAIN_KINDS)
def test_a_padded_batch_with_an_early_end_and_another_turn(kind):
    model = tiny_model(kind, torch.float64)
    store = PrefixStore(model, segment_length=4)
    prompts = torch.tensor([tokens(9, 1), tokens(9, 2), tokens(9, 3)])
    mask = torch.tensor([[1] * 9, [0, 0, 1, 0, 1, 1, 1, 1, 1], [0, 1, 1, 1, 1, 1, 1, 0, 0]])
    plain = model.generate(prompts, attention_mask=mask, max_new_tokens=6, do_sample=False)
    # An early token that the first row writes ends it; the others write on, and the row reads padding.
    end = {"eos_token_id": int(plain[0, 11]), "pad_token_id": 0, "max_new_tokens": 6, "do_sample": False}
    answer = plain[:1, : 9 + plain[0, 9:].tolist().index(end["eos_token_id"]) + 1]
    for _ in range(2):
        expected = model.generate(prompts, attention_mask=mask, **end)
        assert store.generate(prompts, attention_mask=mask, **end).equal(expected)
    turn = torch.cat([answer.repeat(2, 1), torch.tensor([tokens(2, 4), tokens(2, 5)])], dim=1)
    before = store.num_tokens_read
    assert store.generate(turn, **GREEDY).equal(model.generate(turn, **GREEDY))
    # One token of each continuation is read, and the last by `generate`; of an answer that ended last, its last token too.
    assert store.num_tokens_read - before == (2 if answer.shape[1] < expected.shape[1] else 4)


@pytest.mark.parametrize("kind", ["sumagg-decayed-hybrid", "sumagg-sliding-full", "tost-pure"])
@pytest.mark.parametrize(
    "mode",
    [
        {"num_beams": 3},
        {"num_beams": 3, "num_return_sequences": 2, "repetition_penalty": 1.3},
        {"do_sample": True, "num_return_sequences": 3},
        {"return_dict_in_generate": True, "output_scores": True},
    ],
    ids=lambda mode: next(iter(mode)),
)
def test_modes_of_generate(kind, mode):
    model = tiny_model(kind, torch.float64)
    store = PrefixStore(model, segment_length=4)
    arguments = {"do_sample": False, "max_new_tokens": 7, **mode}
    batch = torch.tensor([tokens(6), tokens(6, 1)])
    for _ in range(3):
        outputs = []
        for generate in (model.generate, store.generate):
            torch.manual_seed(0)
            output = generate(batch, **arguments)
            outputs.append(output if isinstance(output, torch.Tensor) else output.sequences)
        assert outputs[1].equal(outputs[0])
        batch = torch.cat([outputs[0][: len(batch)], torch.full((len(batch), 2), 9)], dim=1)
    assert store.num_tokens_reused > 0


@pytest.mark.parametrize("kind", ["sumagg-sinusoidal", "tost-hybrid"])
def test_a_pipeline_with_a_chat_template(kind, tmp_path):
    config = CONFIGS[kind].__class__(**{**CONFIGS[kind].to_dict(), "vocab_size": len(WORDS)})
    model = build(type(tiny_model(kind)), config).double()
    tokenizer = word_tokenizer()
    tokenizer.chat_template = (
        "{% for message in messages %}w{{ 1 if message.role == 'user' else 2 }} {{ message.content }} <eos> {% endfor %}"
        "{% if add_generation_prompt %}w2 {% endif %}"
    )
    pipe = TextGenerationPipeline(model=model, tokenizer=tokenizer)
    store = PrefixStore(model, tmp_path, segment_length=8)
    chats = [[{"role": "user", "content": "w5 w6 w7"}], [{"role": "user", "content": "w9"}]]
    for turn in range(4):
        expected = pipe(chats, batch_size=2, max_new_tokens=6, do_sample=False)
        before = store.num_tokens_read
        with store:
            actual = pipe(chats, batch_size=2, max_new_tokens=6, do_sample=False)
        assert actual == expected
        question = {"role": "user", "content": f"w1{turn} w2{turn}"}
        chats = [[*answers[0]["generated_text"], question] for answers in actual]
    # A turn has the answer of the turn before, and 8 tokens of the template and the question.
    assert store.num_tokens_read - before <= 2 * (6 + 8)
    assert "generate" not in vars(model)


def test_a_streamer_and_stopping_criteria_are_passed_on():
    model = tiny_model("sumagg-decayed")
    tokenizer = word_tokenizer()
    prompt = torch.tensor([tokens(6)])

    class AfterTwo(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            return torch.full((len(input_ids),), input_ids.shape[1] >= 8)

    expected = model.generate(prompt, max_new_tokens=6, do_sample=False)
    store = PrefixStore(model)
    store.generate(prompt, max_new_tokens=6, do_sample=False)
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True)
    arguments = {"stopping_criteria": [AfterTwo()], "streamer": streamer, "max_new_tokens": 6, "do_sample": False}
    assert store.generate(prompt, **arguments).tolist() == expected[:, :8].tolist()
    assert "".join(streamer) == tokenizer.decode(expected[0, 6:8])


def test_the_size_of_a_state():
    config = CONFIGS["sumagg-sliding-full"]
    for layer_type, expected in {
        # Sums in float64; keys and values in float32 of all tokens, or of those that a window of 4 sees behind it.
        "summation": lambda length: 16 * 8,
        "full_attention": lambda length: 2 * 16 * 4 * length,
        "sliding_attention": lambda length: 2 * 16 * 4 * min(length, 3),
    }.items():
        own = config.__class__(**{**config.to_dict(), "layer_types": [layer_type] * 3, "num_hidden_layers": 3})
        model = build(type(tiny_model("sumagg-hybrid")), own)
        for length in (2, 11):
            store = PrefixStore(model)
            store.generate(torch.tensor([tokens(length + 1)]), max_new_tokens=1, do_sample=False)
            # Three layers and the length, after the prompt before its last token, and after the prompt.
            assert store.nbytes == sum(3 * expected(seen) + 8 for seen in (length, length + 1))


@pytest.mark.parametrize("place", ["memory", "folder"])
def test_the_least_recently_used_goes_first(place, tmp_path):
    model = tiny_model("tost-pure")
    prompts = [torch.tensor([tokens(6, seed)]) for seed in range(3)]
    store = store_of(model, tmp_path, place)
    store.generate(prompts[0], max_new_tokens=1)
    # The prompt before its last token, and with it.
    size = store.nbytes // 2
    store.max_bytes = 4 * size
    store.generate(prompts[1], max_new_tokens=1)
    time.sleep(0.01)
    store.generate(prompts[0], max_new_tokens=1)
    time.sleep(0.01)
    store.generate(prompts[2], max_new_tokens=1)
    assert (len(store), store.nbytes) == (4, 4 * size)
    before = store.num_tokens_reused
    store.generate(prompts[1], max_new_tokens=1)
    assert store.num_tokens_reused == before
    store.generate(prompts[2], max_new_tokens=1)
    assert store.num_tokens_reused == before + 5
    store.max_bytes = size - 1
    store.generate(prompts[2], max_new_tokens=1)
    assert (len(store), store.nbytes) == (0, 0)


def test_other_weights_and_other_configs_find_nothing(tmp_path):
    first = build(type(tiny_model("sumagg-pure")), CONFIGS["sumagg-pure"])
    others = [
        build(type(first), CONFIGS["sumagg-pure"], seed=1),
        build(
            type(first), CONFIGS["sumagg-pure"].__class__(**{**CONFIGS["sumagg-pure"].to_dict(), "position_bias": 2.5})
        ),
    ]
    prompt = torch.tensor([tokens(6)])
    store = PrefixStore(first, tmp_path)
    store.generate(prompt, **GREEDY)
    with torch.no_grad():
        first.lm_head.weight.mul_(-1)
    for each in (store, *(PrefixStore(other, tmp_path) for other in others)):
        before = each.num_tokens_reused
        assert each.generate(prompt, **GREEDY).equal(each.model.generate(prompt, **GREEDY))
        assert each.num_tokens_reused == before


def write_for_ever(folder):
    torch.set_num_threads(1)
    store = PrefixStore(tiny_model("sumagg-hybrid"), folder, segment_length=1, max_bytes=20_000)
    while True:
        store.generate(torch.tensor([tokens(60, random.randrange(10**9))]), max_new_tokens=1)


def test_two_processes_and_a_kill_leave_only_whole_states(tmp_path):
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=write_for_ever, args=(tmp_path,)) for _ in range(2)]
    for process in processes:
        process.start()
    while len(list(tmp_path.glob("*.safetensors"))) < 3:
        time.sleep(0.05)
    time.sleep(0.5)
    for process in processes:
        os.kill(process.pid, signal.SIGKILL)
        process.join()
    model = tiny_model("sumagg-hybrid")
    store = PrefixStore(model, tmp_path, segment_length=4)
    names = store._states.names()
    assert names and all(store._states.read(name) is not None for name in names)
    prompt = torch.tensor([tokens(9)])
    assert store.generate(prompt, **GREEDY).equal(model.generate(prompt, **GREEDY))


def test_a_damaged_file_is_removed_and_an_abandoned_one_too(tmp_path, caplog):
    model = tiny_model("sumagg-pure")
    prompt = torch.tensor([tokens(6)])
    PrefixStore(model, tmp_path).generate(prompt, max_new_tokens=1)
    (path,) = tmp_path.glob("5-*.safetensors")
    whole = path.read_bytes()
    path.write_bytes(whole[:-4])
    for name, age in {".1-0.old": 7200, ".1-0.new": 0}.items():
        (tmp_path / name).write_bytes(whole[:100])
        os.utime(tmp_path / name, (time.time() - age,) * 2)
    store = PrefixStore(model, tmp_path)
    assert store.generate(prompt, **GREEDY).equal(model.generate(prompt, **GREEDY))
    assert store.num_tokens_reused == 0
    assert path.read_bytes() == whole
    assert not (tmp_path / ".1-0.old").exists() and (tmp_path / ".1-0.new").exists()


def test_errors():
    model = tiny_model("sumagg-pure")
    store = PrefixStore(model)
    prompt = torch.tensor([tokens(6)])
    with pytest.raises(ValueError, match="leave `prompt_lookup_num_tokens` out"):
        store.generate(prompt, prompt_lookup_num_tokens=2)
    with pytest.raises(ValueError, match="cache of its own"):
        store.generate(prompt, past_key_values=DynamicCache(config=model.config))
    with pytest.raises(ValueError, match="`cache_implementation` cannot be chosen"):
        store.generate(prompt, cache_implementation="static")
    with pytest.raises(ValueError, match=r"one shape \[B, T\].*\[1, 6\] and \[1, 7\]"):
        store.generate(prompt, attention_mask=torch.ones(1, 7))
    with pytest.raises(ValueError, match="padding token, 9"):
        store.generate(torch.full((1, 3), 9), pad_token_id=9)
    with pytest.raises(ValueError, match="`max_bytes` must be at least 1, got 0"):
        PrefixStore(model, max_bytes=0)
    with store, pytest.raises(ValueError, match="replaced already"), PrefixStore(model):
        pass
    try:
        with pytest.raises(ValueError, match=r"call `model.eval\(\)`"):
            store.generate(model.train() and prompt)
    finally:
        model.eval()


@settings(max_examples=15, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data(), kinds=st.lists(st.sampled_from(KINDS), min_size=2, max_size=2, unique=True))
def test_trees_of_prefixes_evictions_and_reopenings_change_no_text(data, kinds, tmp_path_factory):
    models = [tiny_model(kind, torch.float64) for kind in kinds]
    folder = tmp_path_factory.mktemp("states")
    limit = data.draw(st.sampled_from([1_000, 20_000, 10**9]), label="max_bytes")
    length = data.draw(st.integers(1, 6), label="segment_length")

    def opened():
        return [PrefixStore(model, folder, max_bytes=limit, segment_length=length) for model in models]

    stores, texts = opened(), [tokens(1)]
    for _ in range(data.draw(st.integers(1, 5), label="requests")):
        if data.draw(st.booleans(), label="reopen"):
            stores = opened()
        which = data.draw(st.integers(0, 1), label="model")
        rows = []
        for _ in range(data.draw(st.integers(1, 3), label="rows")):
            # From any earlier text, cut anywhere, another branch grows.
            text = data.draw(st.sampled_from(texts), label="text")
            kept = text[: data.draw(st.integers(1, len(text)), label="kept")]
            rows.append(kept + tokens(data.draw(st.integers(0, 7)), data.draw(st.integers(0, 2))))
        width = max(map(len, rows))
        ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
        written = stores[which].generate(ids, attention_mask=mask, max_new_tokens=4, min_new_tokens=4, do_sample=False)
        for row, sequence in zip(rows, written.tolist(), strict=True):
            assert sequence[width:] == greedy_alone(models[which], tuple(row), 4)
            texts.append(row + sequence[width:])
        assert stores[which].nbytes <= limit
