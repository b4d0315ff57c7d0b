"""The states in pages of memory, and the calls on them, without an engine."""

import copy
from types import SimpleNamespace

import pytest
import torch


pytest.importorskip("vllm", reason="needs vLLM, in an environment of its own: `tests/serving/run`")

from vllm.config import VllmConfig, set_current_vllm_config

from modeling_sumagg.decoder.masks import decoder_layout
from modeling_sumagg.serving.layers import put_windows_in
from modeling_sumagg.serving.models import bare_model_class, check_engine, states_of
from modeling_sumagg.serving.states import EngineCache, RecurrentState, Step, page_size, pages
from serving.engines import KINDS, make_model


pytestmark = pytest.mark.serving

RECURRENT = [kind for kind in KINDS if kind != "attention"]


def make_states(config, num_slots: int, device: str) -> dict[int, RecurrentState]:
    """The states of a model in memory of their own, full of NaN."""
    with set_current_vllm_config(VllmConfig()):
        states = {
            i: RecurrentState(o, f"layers.{i}", page_size(o)) for i, o in states_of(config, torch.float32, 1).items()
        }
    for state in states.values():
        state.kv_cache = tuple(
            torch.full((num_slots, *shape), torch.nan, dtype=dtype, device=device) for shape, dtype in state.specs
        )
    return states


def make_step(lengths: list[int], past: list[int], slots: list[int], device: str) -> tuple[Step, torch.Tensor]:
    """A step in which requests bring `lengths` tokens after `past` ones, and the positions of these."""
    positions = torch.cat([torch.arange(a, a + n) for a, n in zip(past, lengths, strict=True)])
    restart = torch.tensor([a == 0 for a in past], device=device)
    step = Step.of_lengths(lengths, torch.tensor(slots, device=device), restart)
    return step, positions.to(device)


def run(model, states, step, positions, ids):
    """The hidden states `[n, d]` after all recurrent layers, one after the other."""
    layout = step.layout(positions)
    cache = EngineCache(states, {state.prefix: step for state in states.values()})
    hidden_states = model.add_positions(
        model.embed_tokens(ids).view(*layout.position_ids.shape, -1), layout.position_ids
    )
    shared = model.shared_arguments(layout)
    for i in states:
        hidden_states = model.layers[i](hidden_states, layout, cache=cache, **shared)
    return hidden_states.flatten(0, 1)


@torch.no_grad()
@pytest.mark.parametrize("kind", RECURRENT)
def test_steps_in_slots_are_the_whole(kind):
    """Two requests in parts, one of them beside tokens that the engine pads with, as each whole in double precision."""
    exact = make_model(kind).model
    model = copy.deepcopy(exact)
    put_windows_in(model)
    states, ids = make_states(model.config, 5, "cpu"), torch.randint(500, (2, 40))
    outputs = [[], []]
    for parts in ([17, 1], [0, 20], [1, 1], [22, 18]):
        rows = [row for row in (0, 1) if parts[row]]
        past = [sum(len(part) for part in outputs[row]) for row in rows]
        step, positions = make_step([parts[row] for row in rows], past, [(4, 2)[row] for row in rows], "cpu")
        tokens = torch.cat([ids[row, a : a + parts[row]] for row, a in zip(rows, past, strict=True)])
        padding = 3 if sum(parts) > 30 else 0
        found = run(
            model,
            states,
            step,
            torch.nn.functional.pad(positions, (0, padding)),
            torch.nn.functional.pad(tokens, (0, padding)),
        )[: sum(parts)]
        for row, part in zip(rows, found.split([parts[row] for row in rows]), strict=True):
            outputs[row].append(part)
    exact.double()
    for row in (0, 1):
        layout = decoder_layout(exact.config, ids[row : row + 1], None, None, None, torch.double)
        hidden_states = exact.add_positions(exact.embed_tokens(ids[row : row + 1]), layout.position_ids)
        shared = exact.shared_arguments(layout)
        for i in states:
            hidden_states = exact.layers[i](hidden_states, layout, **shared)
        torch.testing.assert_close(torch.cat(outputs[row]).double(), hidden_states[0], rtol=5e-4, atol=5e-4)


@pytest.mark.parametrize("lengths", [[1, 1, 1], [3, 1, 20]], ids=["decode", "packed"])
@pytest.mark.parametrize("kind", RECURRENT)
def test_nothing_is_read_on_the_host(kind, lengths):
    """On the device "meta" there is nothing to be read."""
    config = KINDS[kind]().config
    with torch.device("meta"):
        model = bare_model_class(config)(config).eval()
    put_windows_in(model)
    step, positions = make_step(lengths, [5, 0, 7], [3, 1, 2], "meta")
    states = make_states(config, 5, "meta")
    outputs = run(model, states, step, positions, torch.empty(sum(lengths), dtype=torch.long, device="meta"))
    assert outputs.shape == (sum(lengths), config.hidden_size)


def test_the_heads_of_keys_are_split_evenly():
    engine = SimpleNamespace(
        model_config=SimpleNamespace(hf_config=KINDS["converted"]().config),
        parallel_config=SimpleNamespace(tensor_parallel_size=4),
        num_speculative_tokens=0,
    )
    with pytest.raises(ValueError, match="`tensor_parallel_size` must divide `num_key_value_heads` = 2, got 4"):
        check_engine(engine)


def test_pages_are_aligned():
    """Two bfloat16 operators around a float64 one, whose sizes are no multiples of eight."""
    specs = {"a": [((3,), torch.bfloat16)], "b": [((2, 5), torch.float64), ((1,), torch.float32)]}
    order, places = pages(specs)
    assert order == [((2, 5), torch.float64), ((1,), torch.float32), ((3,), torch.bfloat16)]
    assert places == {"a": [2], "b": [0, 1]}
    assert page_size(specs) == 96
