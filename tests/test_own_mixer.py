"""The mixer of `examples/own_mixer`, in every mode, against a loop over tokens in float64."""

import copy
import importlib
import itertools
import json
import math
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, CompileConfig, DynamicCache, StaticCache, Trainer, TrainingArguments

import modeling_sumagg
from modeling_sumagg.publishing import clean_process
from modeling_sumagg.publishing.folder_checks import check_files


ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "examples" / "own_mixer" / "gated_sum.py"
PROMPTS = [(5, 9, 2, 30, 7, 7), (3, 4, 11)]
NEW_TOKENS = 10
COMMON = {"vocab_size": 32, "hidden_size": 16, "num_attention_heads": 4, "intermediate_size": 24}
KINDS = {
    "pure": {"num_hidden_layers": 2},
    "hybrid": {
        "layer_types": ["gated_sum", "full_attention", "gated_sum"],
        "position_embedding_type": "learned",
        "max_position_embeddings": 128,
    },
    "sliding": {
        "layer_types": ["gated_sum", "sliding_attention"],
        "sliding_window": 4,
        "position_embedding_type": "sinusoidal",
    },
}


@pytest.fixture(scope="module")
def gated_sum():
    """The module, imported as a user imports it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(SOURCE.parent)
        yield importlib.import_module("gated_sum")
    modeling_sumagg.FAMILIES.pop("gated_sum")
    sys.modules.pop("gated_sum")


def build(gated_sum, kind, name="GatedSumForCausalLM", seed=0, **arguments):
    """A model in eval mode with random weights, so that every one matters."""
    arguments = {**COMMON, **KINDS[kind], **arguments}
    arguments.setdefault("num_hidden_layers", len(arguments.get("layer_types", [])))
    model = getattr(gated_sum, name)(gated_sum.GatedSumConfig(**arguments)).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "decay" not in name:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.copy_(1 + 0.3 * noise if "norm" in name and name.endswith("weight") else 0.3 * noise)
    return model


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


@pytest.fixture
def model(gated_sum, kind):
    return build(gated_sum, kind)


def loop(z, decay, keep=None):
    """`s_t = a s_{t-1} + (1 - a) z_t` of one row `[T, K, p]` in float64, token by token; `keep`: the real tokens."""
    state, sums = torch.zeros(z.shape[1:], dtype=torch.float64), []
    for t in range(len(z)):
        if keep is None or keep[t]:
            state = decay[:, None] * state + (1 - decay[:, None]) * z[t].double()
        sums.append(state)
    return torch.stack(sums)


def logits_by_loop(model, tokens):
    """The logits `[T, V]` of one sequence in float64, from the weights alone."""
    config, weights = model.config, {name: tensor.double() for name, tensor in model.state_dict().items()}
    d, heads, length = config.hidden_size, config.num_attention_heads, len(tokens)

    def linear(name, x):
        bias = weights.get(f"{name}.bias")
        return x @ weights[f"{name}.weight"].T + (0 if bias is None else bias)

    def norm(name, x):
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, unbiased=False) + config.layer_norm_eps).sqrt()
        return x * weights[f"{name}.weight"] + weights[f"{name}.bias"]

    h = weights["model.embed_tokens.weight"][list(tokens)]
    if config.position_embedding_type == "learned":
        h = h + weights["model.position_embeddings.weight"][:length]
    elif config.position_embedding_type == "sinusoidal":
        angles = torch.tensor([[t / 10000 ** (c / d) for c in range(0, d, 2)] for t in range(length)])
        h = h + torch.cat([angles.sin(), angles.cos()], -1).double()
    for i, layer_type in enumerate(config.layer_types):
        name = f"model.layers.{i}"
        x = norm(f"{name}.mixer_norm", h)
        if layer_type == "gated_sum":
            z = linear(f"{name}.mixer.in_proj", x).view(length, heads, -1)
            gate = linear(f"{name}.mixer.gate_proj", x)
            decay = 1 / (1 + (-weights[f"{name}.mixer.decay_logit"]).exp())
            mixed = gate / (1 + (-gate).exp()) * loop(z, decay).flatten(1)
        else:
            q, k, v = (linear(f"{name}.mixer.{n}_proj", x).view(length, heads, -1) for n in "qkv")
            mixed = torch.zeros_like(v)
            for t in range(length):
                first = max(0, t - config.sliding_window + 1) if layer_type == "sliding_attention" else 0
                scores = (q[t, None] * k[first : t + 1]).sum(-1) / math.sqrt(d // heads)
                mixed[t] = (scores.softmax(0)[..., None] * v[first : t + 1]).sum(0)
            mixed = mixed.flatten(1)
        h = h + linear(f"{name}.mixer.out_proj", mixed)
        x = linear(f"{name}.mlp.up_proj", norm(f"{name}.mlp_norm", h))
        h = h + linear(f"{name}.mlp.down_proj", x * (1 + torch.erf(x / math.sqrt(2))) / 2)
    return norm("model.norm", h) @ weights["lm_head.weight"].T


def greedy(model, prompt, new_tokens=NEW_TOKENS):
    tokens = list(prompt)
    for _ in range(new_tokens):
        tokens.append(logits_by_loop(model, tokens)[-1].argmax().item())
    return tokens[len(prompt) :]


def generated(model, inputs, **options):
    options = {"max_new_tokens": NEW_TOKENS, "do_sample": False, **options}
    return model.generate(**inputs, **options)[:, inputs["input_ids"].shape[1] :].tolist()


def padded(side):
    """The two prompts, the second one padded with tokens of the vocabulary."""
    left = {"left": 3, "right": 0, "both": 1}[side]
    mask = torch.ones(2, 6, dtype=torch.long)
    mask[1, :left] = mask[1, left + 3 :] = 0
    row = (13,) * left + PROMPTS[1] + (13,) * (3 - left)
    return {"input_ids": torch.tensor([PROMPTS[0], row]), "attention_mask": mask}


def close(actual, expected, tolerance=2e-5):
    torch.testing.assert_close(actual.double(), expected, rtol=tolerance, atol=tolerance)


def test_its_page_shows_the_whole_module():
    page = (SOURCE.parent / "README.md").read_text(encoding="utf-8")
    module = SOURCE.read_text(encoding="utf-8")
    assert page.count(f"```python\n{module}```\n") == 1


def test_its_config_has_no_limit_of_length_and_a_table_of_positions_has_one(gated_sum):
    config = gated_sum.GatedSumConfig()
    assert config.position_embedding_type == "none" and not hasattr(config, "max_position_embeddings")
    config = gated_sum.GatedSumConfig(position_embedding_type="learned", max_position_embeddings=8)
    assert config.max_position_embeddings == 8


@pytest.mark.parametrize("length", [1, 2, 7, 64, 300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_operator_is_the_loop_and_goes_on_from_any_cut(gated_sum, length, dtype):
    generator = torch.Generator().manual_seed(length)
    z = torch.randn(2, length, 4, 3, generator=generator).to(dtype)
    logits = torch.tensor([-20.0, 0.0, 3.0, 9.0], dtype=torch.float64)
    real = torch.rand(2, length, generator=generator) < 0.7
    begins = (torch.rand(2, length, generator=generator) < 0.1) & real
    ids = begins.long().cumsum(1)
    z[~real] = torch.nan

    def run(first, last, state):
        arguments = {"attention_mask": real[:, first:last], "document_ids": ids[:, first:last]}
        return gated_sum.decayed_sum(z[:, first:last], initial_state=state, decay_logit=logits, **arguments)

    y, state = run(0, length, None)
    assert state.dtype == torch.promote_types(dtype, torch.float32)
    rtol = {torch.float32: 2e-5, torch.bfloat16: 8e-3, torch.float64: 1e-12}[dtype]
    for row in range(2):
        for document in ids[row].unique():
            keep = real[row] & (ids[row] == document)
            expected = loop(z[row], logits.sigmoid(), keep)
            torch.testing.assert_close(y[row, keep].double(), expected[keep], rtol=rtol, atol=1e-6)
        torch.testing.assert_close(state[row].double(), expected[-1], rtol=2e-5, atol=1e-6)
    for cut in range(1, length, 1 + length // 5):
        # A document that begins with a segment drops the state: what holds the state does that, by `restart`.
        first = real[:, cut:] & (real[:, cut:].cumsum(1) == 1)
        restart = (begins[:, cut:] & first).any(1)
        _, before = run(0, cut, None)
        again, after = run(cut, length, before.masked_fill(restart[:, None, None], 0))
        torch.testing.assert_close(again[real[:, cut:]], y[:, cut:][real[:, cut:]], rtol=2 * rtol, atol=1e-6)
        torch.testing.assert_close(after, state, rtol=2e-5, atol=1e-6)


def test_gradients_of_the_operator_are_those_of_the_loop(gated_sum):
    z = torch.randn(1, 9, 2, 3, dtype=torch.float64, requires_grad=True)
    logits = torch.tensor([0.5, 2.0], dtype=torch.float64, requires_grad=True)
    weights = torch.randn(9, 2, 3, dtype=torch.float64)
    y, _ = gated_sum.decayed_sum(z, initial_state=None, attention_mask=None, document_ids=None, decay_logit=logits)
    gradients = torch.autograd.grad((y[0] * weights).sum(), (z, logits))
    expected = torch.autograd.grad((loop(z[0], logits.sigmoid()) * weights).sum(), (z, logits))
    for actual, gradient in zip(gradients, expected, strict=True):
        torch.testing.assert_close(actual, gradient)


@torch.no_grad()
def test_logits_with_padding_on_either_side_and_with_documents_packed(model):
    for side in ("left", "right", "both"):
        inputs = padded(side)
        logits = model(**inputs).logits
        for row, prompt in enumerate(PROMPTS):
            close(logits[row][inputs["attention_mask"][row].bool()], logits_by_loop(model, prompt))
    packed = torch.tensor([PROMPTS[0] + PROMPTS[1]])
    position_ids = torch.tensor([[*range(6), *range(3)]])
    expected = torch.cat([logits_by_loop(model, prompt) for prompt in PROMPTS])
    close(model(packed, position_ids=position_ids).logits[0], expected)
    # The second document begins with a segment, and goes on in the next.
    cache, parts = DynamicCache(config=model.config), []
    for first, last in [(0, 6), (6, 8), (8, 9)]:
        part = model(packed[:, first:last], position_ids=position_ids[:, first:last], cache=cache)
        parts.append(part.logits[0])
    close(torch.cat(parts), expected)


@pytest.mark.parametrize("side", ["left", "right", "both"])
def test_greedy(model, side):
    assert generated(model, padded(side)) == [greedy(model, prompt) for prompt in PROMPTS]


@torch.no_grad()
def test_beams_find_the_likeliest_continuation(gated_sum, kind):
    # As many beams as there are prefixes: the search sees every continuation of three tokens.
    model = build(gated_sum, kind, vocab_size=5)
    prompts = [(1, 4, 2, 2, 0, 3), (3, 0, 1)]
    inputs = padded("left")
    inputs["input_ids"] = torch.tensor([prompts[0], (1, 1, 1, *prompts[1])])
    expected = []
    for prompt in prompts:
        scores = {}
        for tokens in itertools.product(range(5), repeat=2):
            log_probs = logits_by_loop(model, prompt + tokens).log_softmax(-1)
            before = log_probs[-3, tokens[0]] + log_probs[-2, tokens[1]]
            scores |= {(*tokens, last): (before + log_probs[-1, last]).item() for last in range(5)}
        expected.append(list(max(scores, key=scores.get)))
    assert generated(model, inputs, num_beams=25, max_new_tokens=3) == expected


@torch.no_grad()
@pytest.mark.parametrize("removed", [0, 1, 3, 5])
def test_crop(gated_sum, kind, removed):
    model = build(gated_sum, kind).double()
    cache = DynamicCache(config=model.config)
    mask = torch.ones(1, 11, dtype=torch.long)
    mask[0, 8] = 0
    model(torch.tensor(PROMPTS[:1]), cache=cache)
    cache.activate_past_recording()
    model(torch.tensor([[1, 2, 13]]), attention_mask=mask[:, :9], cache=cache)
    model(torch.tensor([[4, 5]]), attention_mask=mask, cache=cache)
    cache = pickle.loads(pickle.dumps(cache))
    cache.crop(-removed)
    left = 11 - removed
    tokens = [token for token, real in zip((*PROMPTS[0], 1, 2, 13, 4, 5), mask[0].tolist(), strict=True) if real]
    tokens = [*tokens[: mask[0, :left].sum()], 8]
    logits = model(torch.tensor([[8]]), attention_mask=F.pad(mask[:, :left], (0, 1), value=1), cache=cache).logits
    close(logits[0, -1], logits_by_loop(model, tokens)[-1], 1e-6 if kind == "sliding" else 1e-10)


def test_prompt_lookup_and_assisted_decoding(gated_sum, kind, model):
    prompt = (4, 8, 15, 4, 8, 15, 4, 8, 15)
    inputs = {"input_ids": torch.tensor([prompt])}
    assert generated(model, inputs, prompt_lookup_num_tokens=3) == [greedy(model, prompt)]
    smaller = build(gated_sum, kind, hidden_size=8, seed=1)
    assert generated(model, inputs, assistant_model=smaller) == [greedy(model, prompt)]
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1, 1]])
    inputs["attention_mask"] = mask
    assert generated(model, inputs, assistant_model=smaller) == [greedy(model, prompt[2:])]


def test_static_cache_and_one_compiled_graph_for_every_length(model):
    torch._dynamo.reset()
    graphs = []

    def backend(graph_module, example_inputs):
        graphs.append(graph_module)
        return graph_module.forward

    step = torch.compile(model, fullgraph=True, backend=backend)
    cache = StaticCache(config=model.config, max_cache_len=32)
    tokens = list(PROMPTS[0])
    with torch.no_grad():
        logits = model(torch.tensor([tokens]), cache=cache).logits
        for index in range(4):
            tokens.append(logits[0, -1].argmax().item())
            with torch.compiler.set_stance("default" if index == 0 else "fail_on_recompile"):
                position_ids = torch.tensor([[len(tokens) - 1]])
                logits = step(torch.tensor([tokens[-1:]]), position_ids=position_ids, cache=cache).logits
            close(logits[0, -1], logits_by_loop(model, tokens)[-1])
    assert len(graphs) == 1

    expected = [greedy(model, prompt) for prompt in PROMPTS]
    assert generated(model, padded("left"), cache_implementation="static") == expected
    compile_config = CompileConfig(fullgraph=True, backend="aot_eager", mode=None)
    compile_config._compile_all_devices = True
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    options = {"cache_implementation": "static", "compile_config": compile_config}
    assert generated(model, padded("both"), **options) == expected
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def loss_by_loop(model, tokens, label_smoothing=0.0):
    return F.cross_entropy(
        logits_by_loop(model, tokens)[:-1], torch.tensor(tokens[1:]), label_smoothing=label_smoothing
    )


def test_adapters(gated_sum, kind, tmp_path):
    build(gated_sum, kind).save_pretrained(tmp_path / "base")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), LoraConfig())
    adapted = {name.split(".lora_A")[0].split(".")[-1] for name, _ in model.named_parameters() if "lora_A" in name}
    assert adapted == {"in_proj", "gate_proj"} | (set() if kind == "pure" else {"q_proj", "v_proj"})
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    inputs, losses = torch.tensor(PROMPTS[:1]), []
    for _ in range(6):
        losses.append(model(inputs, labels=inputs).loss)
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0]
    model.eval().save_pretrained(tmp_path / "adapter")
    with torch.no_grad():
        adapted_logits = model(inputs).logits
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    merged = PeftModel.from_pretrained(base, tmp_path / "adapter").merge_and_unload().eval()
    # Once merged, the weights are all there is, and the loop knows them.
    expected = logits_by_loop(merged, PROMPTS[0])
    close(adapted_logits[0], expected)
    assert (expected - logits_by_loop(build(gated_sum, kind), PROMPTS[0])).abs().max() > 1e-3


def test_gradient_checkpointing_changes_no_loss_and_no_gradient(model):
    tokens = torch.tensor(PROMPTS[:1])
    model.train()
    gradients = []
    for checkpointed in (False, True):
        if checkpointed:
            model.gradient_checkpointing_enable()
        calls = []
        handle = model.model.layers[0].mixer.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        loss = model(tokens, labels=tokens).loss
        loss.backward()
        handle.remove()
        assert len(calls) == 1 + checkpointed
        close(loss, loss_by_loop(model, PROMPTS[0]))
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
        model.zero_grad()
    for plain, recomputed in zip(*gradients, strict=True):
        assert plain.abs().max() > 0
        torch.testing.assert_close(plain, recomputed)


@torch.no_grad()
def test_bfloat16_rounds_and_does_no_more(model):
    model = model.bfloat16()
    tokens = torch.randint(32, (1, 60), generator=torch.Generator().manual_seed(0))
    expected = logits_by_loop(model, tokens[0].tolist())
    whole = model(tokens, use_cache=False).logits[0].double()
    cache = DynamicCache(config=model.config)
    steps = torch.cat([model(tokens[:, t : t + 1], cache=cache).logits[0] for t in range(60)]).double()
    scale = expected.std()
    for logits in (whole, steps):
        assert (logits - expected).abs().mean() < 0.03 * scale
    assert all(tensor.dtype == torch.float32 for tensor in cache.layers[0].state)


CLEAN = """
import json, runpy, sys
for name in ("modeling_sumagg", "gated_sum"):
    sys.modules[name] = None
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, Trainer, TrainingArguments

source, target, check, finished = sys.argv[1:]
def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
model = load(source)
model.save_pretrained(target)
prompt = torch.tensor([[5, 9, 2, 30, 7, 7]])
lookup = {"max_new_tokens": 10, "do_sample": False}
result = {"tokens": [load(folder).generate(prompt, **lookup)[0, 6:].tolist() for folder in (source, target)]}
arguments = TrainingArguments(target, label_smoothing_factor=0.3, use_cpu=True, report_to=[])
loss = Trainer(model, arguments).compute_loss(model, {"input_ids": prompt, "labels": prompt})
result["smoothed"] = loss.item()
classifier = AutoModelForSequenceClassification.from_pretrained(source, trust_remote_code=True, num_labels=3)
result["classes"] = list(classifier(prompt).logits.shape)
names = [name for name, _ in get_peft_model(model, LoraConfig()).named_parameters() if "lora_A" in name]
result["adapted"] = sorted({name.split(".lora_A")[0].split(".")[-1] for name in names})
# What `check_folder` runs in such a process.
sys.argv = [check, source, finished, "gated_sum"]
runpy.run_path(check, run_name="__main__")
assert not [name for name in sys.modules if name.startswith(("modeling_sumagg.", "gated_sum."))]
print(json.dumps(result))
"""


def test_a_checkpoint_needs_neither_the_package_nor_the_module(gated_sum, tmp_path):
    model = build(gated_sum, "hybrid")
    model.save_pretrained(tmp_path / "saved")
    written = {path.stem.split("_", 2)[2] for path in (tmp_path / "saved").glob("sumagg_*.py")}
    assert {"gated_sum", "recurrence"} <= written
    assert not written & {"modeling_sumagg", "summation", "running_sum_kernels", "operators"}
    folders = tmp_path / "saved", tmp_path / "again"
    command = [sys.executable, "-I", "-c", CLEAN, *folders, clean_process.__file__, tmp_path / "finished"]
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    process = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr[-3000:]
    result = json.loads(process.stdout.splitlines()[-1])
    assert result["tokens"] == [greedy(model, PROMPTS[0])] * 2
    assert result["smoothed"] == pytest.approx(loss_by_loop(model, PROMPTS[0], 0.3).item(), rel=1e-5)
    assert result["classes"] == [1, 3]
    assert result["adapted"] == ["gate_proj", "in_proj", "q_proj", "v_proj"]
    # The check of the folder misses nothing but a card.
    assert (tmp_path / "finished").exists()
    check_files(tmp_path / "saved")


def test_trainer(gated_sum, kind, tmp_path):
    model = build(gated_sum, kind)
    rows = [{"input_ids": list(PROMPTS[0]), "labels": list(PROMPTS[0])}] * 4
    before = loss_by_loop(model, PROMPTS[0])
    arguments = TrainingArguments(
        tmp_path, max_steps=8, save_steps=8, learning_rate=1e-2, report_to=[], use_cpu=True, disable_tqdm=True
    )
    trainer = Trainer(model, arguments, train_dataset=rows, eval_dataset=rows)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(before.item(), rel=1e-5)
    trainer.train()
    after = loss_by_loop(model, PROMPTS[0]).item()
    assert after < 0.8 * before
    assert trainer.evaluate()["eval_loss"] == pytest.approx(after, rel=1e-5)
    assert len(list((tmp_path / "checkpoint-8").glob("sumagg_*_gated_sum.py"))) == 1
    smoothed = TrainingArguments(tmp_path, label_smoothing_factor=0.3, use_cpu=True, report_to=[])
    inputs = torch.tensor(PROMPTS[:1])
    loss = Trainer(model, smoothed).compute_loss(model, {"input_ids": inputs, "labels": inputs})
    close(loss, loss_by_loop(model, PROMPTS[0], 0.3))


def test_classifier_pools_the_last_real_token(gated_sum, kind):
    model = build(gated_sum, kind, "GatedSumForSequenceClassification", num_labels=3)
    language_model = copy.deepcopy(build(gated_sum, kind, tie_word_embeddings=False))
    language_model.model = model.model
    with torch.no_grad():
        language_model.lm_head.weight.zero_()[:16] = torch.eye(16)
        logits = model(**padded("right")).logits
        for row, prompt in enumerate(PROMPTS):
            last = logits_by_loop(language_model, prompt)[-1, :16]
            close(logits[row], last @ model.score.weight.double().T + model.score.bias.double())
