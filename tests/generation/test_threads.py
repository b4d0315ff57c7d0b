"""`generate` in every mode, in threads beside each other on one model: each writes what it writes alone."""

import threading

import pytest
import torch

from modeling_sumagg.common.compatibility import find_cache

from .kinds import greedy_alone, tiny_model
from .test_assisted import smaller


NEW_TOKENS = 6
PROMPTS = [(5, 9, 2, 30, 7, 7), (3, 4, 5, 9, 2, 30)]
MASK = [[1] * 6, [0, 0, 1, 1, 1, 1]]
MODES = {
    "dynamic": {},
    "static": {"cache_implementation": "static"},
    "no cache": {"use_cache": False},
    "chunked prefill": {"prefill_chunk_size": 2},
    "prompt lookup": {"prompt_lookup_num_tokens": 2},
    "early exit": {"assistant_early_exit": 1},
    "the same early exit": {"assistant_early_exit": 1},
    "an assistant": {},
    "padding": {},
    "kept": {"return_dict_in_generate": True},
}


def call(model, mode: str) -> list[list[int]]:
    options, inputs = dict(MODES[mode]), {"input_ids": torch.tensor(PROMPTS[:1])}
    if mode == "an assistant":
        options["assistant_model"] = smaller(model)
    if mode in ("padding", "kept"):
        inputs = {"input_ids": torch.tensor(PROMPTS), "attention_mask": torch.tensor(MASK)}
    generated = model.generate(**inputs, **options, max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=0)
    if mode == "kept":
        assert find_cache(generated).get_seq_length() == 6 + NEW_TOKENS - 1
        generated = generated.sequences
    return generated[:, 6:].tolist()


@pytest.mark.parametrize("kind", ["sumagg-sliding-full", "tost-decayed-hybrid"])
def test_threads_beside_each_other(kind):
    model = tiny_model(kind)
    rows = [greedy_alone(model, PROMPTS[0], NEW_TOKENS), greedy_alone(model, PROMPTS[1][2:], NEW_TOKENS)]
    barrier, results = threading.Barrier(len(MODES)), {}

    def run(mode: str) -> None:
        barrier.wait()
        try:
            results[mode] = [call(model, mode) for _ in range(3)]
        except Exception as error:
            results[mode] = error

    threads = [threading.Thread(target=run, args=(mode,)) for mode in MODES]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for mode, result in results.items():
        assert result == [rows if mode in ("padding", "kept") else rows[:1]] * 3, mode
    assert model.config.num_hidden_layers == len(model.model.layers)


@pytest.mark.parametrize("kind", ["sumagg-sliding-full", "tost-decayed-hybrid"])
def test_an_early_exit_changes_nothing_that_others_read(kind):
    model = tiny_model(kind)
    num_layers, runs = len(model.model.layers), []

    def count(layer_idx: int) -> None:
        assert model.config.num_hidden_layers == len(model.config.layer_types) == num_layers
        runs.append(1) if layer_idx == 0 else runs.append(runs.pop() + 1)

    handles = [layer.register_forward_hook(lambda *args, i=i: count(i)) for i, layer in enumerate(model.model.layers)]
    expected = greedy_alone(model, PROMPTS[0], NEW_TOKENS)
    for early_exit in range(1, num_layers + 1):
        runs.clear()
        generated = model.generate(
            torch.tensor(PROMPTS[:1]), assistant_early_exit=early_exit, max_new_tokens=NEW_TOKENS, do_sample=False
        )
        assert generated[0, 6:].tolist() == expected
        assert set(runs) == {early_exit, num_layers}
    for handle in handles:
        handle.remove()
