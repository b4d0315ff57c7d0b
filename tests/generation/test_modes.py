"""Every mode of `generate` against full forward passes of each sequence alone."""

import copy
import itertools
import logging
import math

import pytest
import torch
from tokenizers import Tokenizer, decoders, models
from transformers import DynamicCache, GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast, set_seed
from transformers.generation.streamers import BaseStreamer

from modeling_sumagg import SumAggConfig, SumAggForCausalLM, ToSTForCausalLM, ToSTTextConfig
from modeling_sumagg.common.compatibility import CACHE_NAME, find_cache

from .kinds import CONFIGS, MAIN_KINDS, VOCAB_SIZE, build, greedy_alone, logits_alone, tiny_model


NEW_TOKENS = 5
PROMPTS = [(5, 9, 2, 30, 7, 7), (3, 4), (3, 4), (11, 2, 8)]
# The columns of the batch: where each prompt stands, 1 for padding.
LAYOUTS = {
    "left": [[0, 0, 0, 0, 0, 0], [1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 0, 0], [1, 1, 1, 0, 0, 0]],
    "mixed": [[0, 0, 0, 0, 0, 0], [0, 0, 1, 1, 1, 1], [1, 1, 0, 0, 1, 1], [0, 1, 0, 1, 1, 0]],
}


@pytest.fixture(params=MAIN_KINDS)
def model(request):
    return tiny_model(request.param)


def padded_batch(layout: str = "mixed") -> dict[str, torch.Tensor]:
    """`PROMPTS` as `input_ids` and `attention_mask`, with arbitrary ids in the padding."""
    padding = torch.tensor(LAYOUTS[layout])
    input_ids = torch.full_like(padding, 13)
    for row, prompt in enumerate(PROMPTS):
        input_ids[row, padding[row] == 0] = torch.tensor(prompt)
    return {"input_ids": input_ids, "attention_mask": 1 - padding}


@pytest.mark.parametrize("kind", MAIN_KINDS)
def test_transformers_warns_of_right_padding_only_where_it_is_taken_for_text(kind, caplog, monkeypatch):
    model = tiny_model(kind)
    inputs = {
        "input_ids": torch.tensor([[5, 9, 2], [3, 13, 13]]),
        "attention_mask": torch.tensor([[1, 1, 1], [1, 0, 0]]),
    }
    options = {"pad_token_id": 13, "eos_token_id": 13, "max_new_tokens": 2, "do_sample": False}
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    model.generate(**inputs, **options)
    assert "padding" not in caplog.text
    # The mask has not been passed, and cannot be guessed: the padding ends a text.
    model.generate(inputs["input_ids"], **options)
    assert "right-padding was detected" in caplog.text
    caplog.clear()
    config = GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=20, bos_token_id=13, eos_token_id=13)
    GPT2LMHeadModel(config).generate(**inputs, **options)
    assert "right-padding was detected" in caplog.text


def new_tokens(generated: torch.Tensor, inputs: dict[str, torch.Tensor]) -> list[list[int]]:
    return generated[:, inputs["input_ids"].shape[1] :].tolist()


def greedy_new_tokens(model, prompts=PROMPTS, length: int = NEW_TOKENS) -> list[list[int]]:
    return [greedy_alone(model, tuple(prompt), length) for prompt in prompts]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_cache": False},
        {"cache_implementation": "dynamic"},
        {"cache_implementation": "static"},
        {"prefill_chunk_size": 6},
        {"prefill_chunk_size": 6, "cache_implementation": "static"},
        {"logits_to_keep": 0},
    ],
    ids=str,
)
def test_greedy_in_a_padded_batch_is_greedy_alone(model, options):
    inputs = padded_batch()
    generated = model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False, **options)
    assert new_tokens(generated, inputs) == greedy_new_tokens(model)


@pytest.mark.parametrize(
    "kind", [kind for kind in MAIN_KINDS if any("attention" in t for t in CONFIGS[kind].layer_types)]
)
def test_eager_attention_writes_what_sdpa_does(kind):
    inputs = padded_batch()
    eager = tiny_model(kind, attention="eager")
    generated = eager.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)
    assert new_tokens(generated, inputs) == greedy_new_tokens(tiny_model(kind, attention="sdpa"))


def test_positions_that_are_given_are_those_counted(model):
    inputs = padded_batch()
    position_ids = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
    generated = model.generate(**inputs, position_ids=position_ids, max_new_tokens=NEW_TOKENS, do_sample=False)
    assert new_tokens(generated, inputs) == greedy_new_tokens(model)


@pytest.mark.parametrize("mask", [[0, 0, 1, 1, 1], [1, 1, 1, 0, 0], [0, 1, 0, 1, 1]], ids=str)
def test_a_padded_batch_of_one(model, mask):
    inputs = {"input_ids": torch.tensor([[4, 8, 15, 16, 23]]), "attention_mask": torch.tensor([mask])}
    prompt = inputs["input_ids"][inputs["attention_mask"].bool()].tolist()
    generated = model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)
    assert new_tokens(generated, inputs) == greedy_new_tokens(model, [prompt])


@pytest.mark.parametrize("options", [{}, {"cache_implementation": "static"}], ids=str)
@pytest.mark.parametrize("chunk_size", [1, 4])
def test_chunked_prefill_of_a_left_padded_batch(model, chunk_size, options):
    inputs = padded_batch("left")
    generated = model.generate(
        **inputs, max_new_tokens=NEW_TOKENS, do_sample=False, prefill_chunk_size=chunk_size, **options
    )
    assert new_tokens(generated, inputs) == greedy_new_tokens(model)


@pytest.mark.parametrize(("layout", "pieces"), [("left", 3), ("mixed", 1)])
def test_long_prompts_are_read_in_pieces(model, layout, pieces, monkeypatch):
    monkeypatch.setattr("modeling_sumagg.decoder.generation.LONG_PROMPT", 6)
    monkeypatch.setattr("modeling_sumagg.decoder.generation.PREFILL_PIECE", 2)
    lengths, forward = [], model.forward
    monkeypatch.setattr(
        model,
        "forward",
        lambda input_ids, **kwargs: lengths.append(input_ids.shape[1]) or forward(input_ids=input_ids, **kwargs),
    )
    inputs = padded_batch(layout)
    generated = model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)
    prefill = lengths[: -(NEW_TOKENS - 1)]
    assert new_tokens(generated, inputs) == greedy_new_tokens(model)
    # A piece at the end that is all padding of a row would predict nothing, and full attention is faster at once.
    pieces = 1 if "full_attention" in model.config.layer_types else pieces
    assert prefill == [6 // pieces] * pieces


def test_chunked_prefill_whose_last_chunk_is_padding_is_refused(model):
    with pytest.raises(ValueError, match="`prefill_chunk_size`"):
        model.generate(**padded_batch(), max_new_tokens=1, do_sample=False, prefill_chunk_size=4)


def test_sampling(model):
    inputs = padded_batch()
    set_seed(0)
    generated = model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=True, temperature=0.7, top_k=0)

    set_seed(0)
    rows = [list(prompt) for prompt in PROMPTS]
    for _ in range(NEW_TOKENS):
        logits = torch.stack([logits_alone(model, row)[-1] for row in rows])
        for row, token in zip(rows, torch.multinomial((logits / 0.7).softmax(-1), 1), strict=True):
            row.append(token.item())
    assert new_tokens(generated, inputs) == [row[-NEW_TOKENS:] for row in rows]


def test_beam_search_as_wide_as_the_vocabulary_is_exhaustive(model):
    inputs = padded_batch()
    generated = model.generate(
        **inputs, max_new_tokens=2, num_beams=VOCAB_SIZE, num_return_sequences=3, do_sample=False
    )
    expected = []
    for prompt in PROMPTS:
        first = logits_alone(model, list(prompt))[-1].log_softmax(-1)
        every = torch.tensor([[*prompt, token] for token in range(VOCAB_SIZE)])
        second = model(every, use_cache=False).logits[:, -1].log_softmax(-1)
        best = (first[:, None] + second).flatten().topk(3).indices
        expected += [[i // VOCAB_SIZE, i % VOCAB_SIZE] for i in best.tolist()]
    assert new_tokens(generated, inputs) == expected


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 3},
        {"num_beams": 4, "num_return_sequences": 2, "do_sample": True},
        {"num_return_sequences": 3, "do_sample": True},
        {"num_beams": 3, "num_return_sequences": 2, "cache_implementation": "static"},
        {"num_return_sequences": 3, "do_sample": True, "cache_implementation": "static"},
    ],
    ids=["beam search", "beam sampling", "several samples", "static beams", "static samples"],
)
def test_a_cache_that_is_repeated_and_reordered_changes_nothing(model, options):
    inputs, generated = padded_batch(), []
    without_cache = {**options, "cache_implementation": None, "use_cache": False}
    for arguments in (options, without_cache):
        set_seed(1)
        generated.append(model.generate(**inputs, max_new_tokens=NEW_TOKENS, **arguments))
    assert generated[0].tolist() == generated[1].tolist()
    if not options.get("do_sample"):
        # Without a cache, the padded batch must be the sequences alone.
        alone = [
            model.generate(torch.tensor([p]), max_new_tokens=NEW_TOKENS, **without_cache)[:, len(p) :] for p in PROMPTS
        ]
        assert new_tokens(generated[0], inputs) == torch.cat(alone).tolist()


def test_scores_of_beams_are_probabilities_of_their_sequences(model):
    inputs = padded_batch()
    outputs = model.generate(
        **inputs,
        max_new_tokens=NEW_TOKENS,
        num_beams=3,
        num_return_sequences=2,
        do_sample=False,
        return_dict_in_generate=True,
        output_scores=True,
    )
    rows = [list(prompt) for prompt in PROMPTS for _ in range(2)]
    for row, tokens, score in zip(rows, new_tokens(outputs.sequences, inputs), outputs.sequences_scores, strict=True):
        logits = logits_alone(model, row + tokens)[len(row) - 1 : -1].log_softmax(-1)
        expected = logits[torch.arange(NEW_TOKENS), tokens].mean()
        assert math.isclose(score.item(), expected.item(), abs_tol=1e-4)


def test_classifier_free_guidance(model):
    prompt, negative = list(PROMPTS[0]), list(PROMPTS[1])
    generated = model.generate(
        torch.tensor([prompt]),
        negative_prompt_ids=torch.tensor([negative]),
        guidance_scale=1.5,
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
    )
    tokens: list[int] = []
    for _ in range(NEW_TOKENS):
        conditional = logits_alone(model, prompt + tokens)[-1].log_softmax(-1)
        # transformers feeds the last token of the prompt to the unconditional branch, then the new ones.
        unconditional = logits_alone(model, negative + tokens)[-1].log_softmax(-1)
        tokens.append((unconditional + 1.5 * (conditional - unconditional)).argmax().item())
    assert generated[0, len(prompt) :].tolist() == tokens


@pytest.mark.parametrize("options", [{}, {"cache_implementation": "static"}], ids=str)
def test_inputs_embeds(model, options):
    inputs = padded_batch()
    generated = model.generate(
        inputs_embeds=model.get_input_embeddings()(inputs["input_ids"]),
        attention_mask=inputs["attention_mask"],
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        **options,
    )
    assert generated.tolist() == greedy_new_tokens(model)


def test_inputs_embeds_go_on_from_the_returned_cache(model):
    embed, prompt = model.get_input_embeddings(), torch.tensor(PROMPTS[:1])
    first = model.generate(
        inputs_embeds=embed(prompt), max_new_tokens=NEW_TOKENS, do_sample=False, return_dict_in_generate=True
    )
    history = torch.cat([prompt, first.sequences, torch.tensor(TURN[:1])], dim=1)
    generated = model.generate(
        inputs_embeds=embed(history),
        cache=find_cache(first),
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
    )
    assert generated[0].tolist() == greedy_alone(model, tuple(history[0].tolist()), NEW_TOKENS)


def test_an_empty_prompt_begins_with_bos(model):
    generated = model.generate(bos_token_id=3, max_new_tokens=NEW_TOKENS, do_sample=False)
    assert generated.tolist() == [[3, *greedy_alone(model, (3,), NEW_TOKENS)]]


def test_finished_rows_are_padded(model):
    expected = greedy_new_tokens(model, length=NEW_TOKENS)
    eos_token_id = expected[1][1]
    inputs = padded_batch()
    generated = model.generate(
        **inputs, max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=eos_token_id, pad_token_id=31
    )
    for row, tokens in zip(new_tokens(generated, inputs), expected, strict=True):
        stop = tokens.index(eos_token_id) + 1 if eos_token_id in tokens else NEW_TOKENS
        assert row == tokens[:stop] + [31] * (len(row) - stop)


@pytest.mark.parametrize("options", [{}, {"cache_implementation": "static"}, {"prompt_lookup_num_tokens": 2}], ids=str)
def test_stop_strings(model, options):
    letters = "abcdefghijklmnopqrstuvwxyzABCDEF"
    characters = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    characters.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=characters)
    expected = "".join(letters[token] for token in greedy_alone(model, PROMPTS[0], NEW_TOKENS))
    stop_string = expected[1:3]
    generated = model.generate(
        torch.tensor(PROMPTS[:1]),
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        stop_strings=[stop_string],
        tokenizer=tokenizer,
        **options,
    )
    text = tokenizer.decode(generated[0, len(PROMPTS[0]) :])
    # Candidates that are accepted along with the end of the stop string stay.
    end = expected.index(stop_string) + 2
    assert expected.startswith(text) and end <= len(text) <= end + options.get("prompt_lookup_num_tokens", 0)


class _Collector(BaseStreamer):
    def __init__(self):
        self.tokens: list[int] = []
        self.ended = False

    def put(self, value: torch.Tensor) -> None:
        self.tokens += value.flatten().tolist()

    def end(self) -> None:
        self.ended = True


def test_streamers(model):
    streamer = _Collector()
    model.generate(torch.tensor(PROMPTS[:1]), max_new_tokens=NEW_TOKENS, do_sample=False, streamer=streamer)
    assert streamer.ended
    assert streamer.tokens == [*PROMPTS[0], *greedy_alone(model, PROMPTS[0], NEW_TOKENS)]


@pytest.mark.parametrize("kind", MAIN_KINDS)
def test_outputs(kind):
    model = tiny_model(kind, attention="eager")
    inputs = padded_batch()
    outputs = model.generate(
        **inputs,
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        return_dict_in_generate=True,
        output_scores=True,
        output_logits=True,
        output_hidden_states=True,
        output_attentions=True,
    )
    expected = greedy_new_tokens(model)
    assert new_tokens(outputs.sequences, inputs) == expected
    config = model.config
    # ToST models give the memberships of token statistics among the attentions, [B, K, T].
    num_attention_layers = sum(layer_type.endswith("attention") for layer_type in config.layer_types)
    num_recorded = config.num_hidden_layers if config.model_type == "tost_text" else num_attention_layers
    length = inputs["input_ids"].shape[1]
    for step in range(NEW_TOKENS):
        rows = [[*prompt, *tokens[:step]] for prompt, tokens in zip(PROMPTS, expected, strict=True)]
        alone = [model(torch.tensor([row]), output_hidden_states=True) for row in rows]
        torch.testing.assert_close(
            outputs.logits[step], torch.stack([output.logits[0, -1] for output in alone]), rtol=1e-4, atol=1e-4
        )
        torch.testing.assert_close(outputs.scores[step], outputs.logits[step])
        assert len(outputs.hidden_states[step]) == config.num_hidden_layers + 1
        torch.testing.assert_close(
            outputs.hidden_states[step][-1][:, -1],
            torch.stack([output.hidden_states[-1][0, -1] for output in alone]),
            rtol=1e-4,
            atol=1e-4,
        )
        assert len(outputs.attentions[step]) == num_recorded
        attentions = [attention for attention in outputs.attentions[step] if attention.dim() == 4]
        assert len(attentions) == num_attention_layers
        for attention in attentions:
            assert attention.shape[:3] == (len(PROMPTS), config.num_attention_heads, 1 if step else length)
            torch.testing.assert_close(
                attention[:, :, -1].sum(-1), torch.ones(len(PROMPTS), config.num_attention_heads)
            )
    assert find_cache(outputs).get_seq_length() == length + NEW_TOKENS - 1
    transition_scores = model.compute_transition_scores(outputs.sequences, outputs.scores, normalize_logits=True)
    expected_score = logits_alone(model, list(PROMPTS[3]))[-1].log_softmax(-1)[expected[3][0]]
    assert math.isclose(transition_scores[3, 0].item(), expected_score.item(), abs_tol=1e-4)


TURN = [(6, 21, 6), (14,), (9, 9), (3, 8)]


@pytest.mark.parametrize("whole", [True, False], ids=["all ids", "new ids"])
@pytest.mark.parametrize("options", [{}, {"cache_implementation": "static"}], ids=str)
def test_the_next_turn_goes_on_from_the_returned_cache(model, whole, options):
    inputs = padded_batch()
    if options:
        options = {**options, "max_cache_len": 64}
    first = model.generate(
        **inputs, max_new_tokens=NEW_TOKENS, do_sample=False, return_dict_in_generate=True, **options
    )
    # The last token generated has not been seen by the model; the second turn has padding of its own.
    turn = torch.tensor([[6, 21, 6], [14, 13, 13], [9, 13, 9], [13, 3, 8]])
    turn_mask = torch.tensor([[1, 1, 1], [1, 0, 0], [1, 0, 1], [0, 1, 1]])
    input_ids = torch.cat([first.sequences, turn], dim=1)
    mask = torch.cat(
        [inputs["attention_mask"], torch.ones(len(PROMPTS), NEW_TOKENS, dtype=torch.long), turn_mask], dim=1
    )
    generated = model.generate(
        input_ids if whole else input_ids[:, find_cache(first).get_seq_length() :],
        attention_mask=mask,
        cache=find_cache(first),
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
    )
    histories = [
        (*prompt, *tokens, *turn) for prompt, tokens, turn in zip(PROMPTS, greedy_new_tokens(model), TURN, strict=True)
    ]
    assert generated[:, -NEW_TOKENS:].tolist() == greedy_new_tokens(model, histories)


def test_new_ids_without_a_mask_of_the_past_are_refused(model):
    first = model.generate(torch.tensor(PROMPTS[:1]), max_new_tokens=2, do_sample=False, return_dict_in_generate=True)
    with pytest.raises(ValueError, match="attention_mask"):
        model.generate(torch.tensor([[6, 21, 6]]), cache=find_cache(first), max_new_tokens=2)


@torch.no_grad()
def test_one_prefilled_cache_for_many_continuations(model):
    prefix = PROMPTS[0]
    cache = DynamicCache(config=model.config)
    model(torch.tensor([prefix]), cache=cache)
    for continuation in PROMPTS:
        tokens = (*prefix, *continuation)
        generated = model.generate(
            torch.tensor([tokens]),
            cache=copy.deepcopy(cache),
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
        )
        assert generated[0, len(tokens) :].tolist() == greedy_alone(model, tokens, NEW_TOKENS)


@pytest.mark.parametrize("options", [{}, {"cache_implementation": "static"}, {"use_cache": False}], ids=str)
@pytest.mark.parametrize("padded", [False, True])
def test_packed_prompts_by_restarting_positions(model, padded, options):
    documents = [[2, 3, 4, 5, 6], [7, 8], [9, 10, 11]]
    packed = [documents, documents[::-1]]
    input_ids = torch.tensor([list(itertools.chain(*row)) for row in packed])
    position_ids = torch.tensor([list(itertools.chain(*(range(len(d)) for d in row))) for row in packed])
    mask = torch.ones_like(input_ids)
    if padded:
        input_ids = torch.cat([input_ids[:, :3], torch.full((2, 2), 13), input_ids[:, 3:]], dim=1)
        position_ids = torch.cat([position_ids[:, :3], torch.zeros(2, 2).long(), position_ids[:, 3:]], dim=1)
        mask = torch.tensor([[1] * 3 + [0] * 2 + [1] * 7] * 2)
    generated = model.generate(
        input_ids,
        attention_mask=mask,
        position_ids=position_ids,
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        **options,
    )
    assert generated[:, -NEW_TOKENS:].tolist() == greedy_new_tokens(model, [row[-1] for row in packed])


def test_a_cache_of_another_batch_size_is_refused_by_transformers_or_torch(model):
    cache = DynamicCache(config=model.config)
    model(torch.tensor(PROMPTS[:1]), cache=cache)
    with pytest.raises((ValueError, RuntimeError)):
        model(torch.tensor([[1], [2]]), cache=cache)


@pytest.mark.parametrize("config", [SumAggConfig, ToSTTextConfig])
@torch.no_grad()
def test_a_model_without_layers(config):
    model_class = SumAggForCausalLM if config is SumAggConfig else ToSTForCausalLM
    sizes = {"vocab_size": VOCAB_SIZE, "hidden_size": 16, "num_hidden_layers": 0, "num_attention_heads": 2}
    model = build(model_class, config(**sizes, position_embedding_type="learned"))
    inputs = padded_batch()
    for options in ({}, {"cache_implementation": "static"}, {"return_dict_in_generate": True}):
        generated = model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False, **options)
        generated = generated.sequences if options.get("return_dict_in_generate") else generated
        assert new_tokens(generated, inputs) == greedy_new_tokens(model)
    with pytest.raises(ValueError, match="A model without layers has no decode state: pass no `cache`"):
        model.generate(**inputs, max_new_tokens=2, **{CACHE_NAME: DynamicCache(config=model.config)})
