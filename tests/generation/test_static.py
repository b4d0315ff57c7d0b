"""Static caches: one graph for every length, and the results of the dynamic cache."""

import pytest
import torch
from transformers import CompileConfig, StaticCache

from .kinds import MAIN_KINDS, greedy_alone, logits_alone, tiny_model


PROMPTS = [(5, 9, 2, 30, 7, 7), (3, 4, 11)]
NEW_TOKENS = 10


def padded_batch() -> dict[str, torch.Tensor]:
    return {
        "input_ids": torch.tensor([PROMPTS[0], (13, *PROMPTS[1], 13, 13)]),
        "attention_mask": torch.tensor([[1] * 6, [0, 1, 1, 1, 0, 0]]),
    }


# Sums, keys, token statistics, and both kinds of attention. The test below compiles the steps of all kinds, by `generate`.
@pytest.mark.parametrize("kind", ["sumagg-sliding-full", "sumagg-keyed-sliding", "tost-hybrid"])
def test_a_decode_step_is_one_graph_for_every_length(kind):
    model = tiny_model(kind)
    torch._dynamo.reset()
    graphs = []

    def backend(graph_module, example_inputs):
        graphs.append(graph_module)
        return graph_module.forward

    step = torch.compile(model, fullgraph=True, backend=backend)
    cache = StaticCache(config=model.config, max_cache_len=64)
    prompt = torch.tensor(PROMPTS[:1])
    with torch.no_grad():
        logits = model(prompt, cache=cache).logits
        history = list(PROMPTS[0])
        for length in range(12):
            history.append(logits[0, -1].argmax().item())
            position_ids = torch.tensor([[len(history) - 1]])
            with torch.compiler.set_stance("default" if length < 1 else "fail_on_recompile"):
                logits = step(torch.tensor([history[-1:]]), position_ids=position_ids, cache=cache).logits
            torch.testing.assert_close(logits[0, -1], logits_alone(model, history)[-1], rtol=1e-4, atol=1e-4)
    assert len(graphs) == 1
    assert tuple(history[len(PROMPTS[0]) :]) == tuple(greedy_alone(model, PROMPTS[0], 12))


# Those left out of `MAIN_KINDS` have only layers that one of these has too.
@pytest.mark.parametrize(
    "kind",
    [
        "sumagg-decayed-hybrid",
        "sumagg-sliding-full",
        "sumagg-keyed-sliding",
        "sumagg-sinks",
        "sumagg-window-and-sum",
        "tost-hybrid",
    ],
)
def test_compiled_generation_equals_each_sequence_alone(kind):
    model = tiny_model(kind)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compile_config = CompileConfig(fullgraph=True, backend="aot_eager", mode=None)
    compile_config._compile_all_devices = True
    generated = model.generate(
        **padded_batch(),
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        cache_implementation="static",
        compile_config=compile_config,
    )
    expected = [greedy_alone(model, prompt, NEW_TOKENS) for prompt in PROMPTS]
    assert generated[:, 6:].tolist() == expected
    counters = torch._dynamo.utils.counters
    assert counters["stats"]["unique_graphs"] == 1, "the decode step was not compiled, or more than once"
    assert not counters["graph_break"]
    # The next call, with another prompt, finds the compiled step.
    with torch.compiler.set_stance("fail_on_recompile"):
        generated = model.generate(
            torch.tensor([[1, 2, 3, 4, 5, 6], [7, 8, 9, 10, 11, 12]]),
            attention_mask=torch.tensor([[0, 1, 1, 1, 1, 1], [1] * 6]),
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            cache_implementation="static",
            compile_config=compile_config,
        )
    expected = [greedy_alone(model, prompt, NEW_TOKENS) for prompt in [(2, 3, 4, 5, 6), (7, 8, 9, 10, 11, 12)]]
    assert generated[:, 6:].tolist() == expected


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sumagg-sliding-full", "tost-hybrid"])
def test_compiled_generation_by_inductor(kind):
    model = tiny_model(kind)
    torch._dynamo.reset()
    compile_config = CompileConfig(fullgraph=True, mode=None)
    compile_config._compile_all_devices = True
    generated = model.generate(
        **padded_batch(),
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        cache_implementation="static",
        compile_config=compile_config,
    )
    assert generated[:, 6:].tolist() == [greedy_alone(model, prompt, NEW_TOKENS) for prompt in PROMPTS]


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"prefill_chunk_size": 4}], ids=str)
def test_flex_attention_asks_its_mask_again_when_the_cache_has_counted_on(options):
    model = tiny_model("sumagg-sliding-full", attention="flex_attention")
    torch._dynamo.reset()
    generated = model.generate(
        input_ids=torch.tensor([PROMPTS[0], (13, 13, 13, *PROMPTS[1])]),
        attention_mask=torch.tensor([[1] * 6, [0, 0, 0, 1, 1, 1]]),
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        cache_implementation="static",
        **options,
    )
    sdpa = tiny_model("sumagg-sliding-full")
    assert generated[:, 6:].tolist() == [greedy_alone(sdpa, prompt, NEW_TOKENS) for prompt in PROMPTS]


@pytest.mark.parametrize("kind", MAIN_KINDS)
def test_reset_keeps_the_addresses(kind):
    model = tiny_model(kind)
    cache = StaticCache(config=model.config, max_cache_len=32)
    with torch.no_grad():
        model(torch.tensor(PROMPTS[:1]), cache=cache)
        addresses = [t.data_ptr() for layer in cache.layers for t in (getattr(layer, "state", None) or (layer.keys,))]
        cache.reset()
        assert cache.get_seq_length() == 0
        logits = model(torch.tensor([[8, 1, 2]]), cache=cache).logits[0]
    assert addresses == [
        t.data_ptr() for layer in cache.layers for t in (getattr(layer, "state", None) or (layer.keys,))
    ]
    torch.testing.assert_close(logits, logits_alone(model, [8, 1, 2]), rtol=1e-4, atol=1e-4)
