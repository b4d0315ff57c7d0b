"""A stream of 100,000 tokens: the state does not grow, and a token costs the same at its end as at its beginning."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import DynamicCache

from modeling_sumagg.streams.saved_states import cache_to_tensors

from .kinds import SLIDING_WINDOW, VOCAB_SIZE, logits_alone, tiny_model


LENGTH, CHUNK, NUM_STEPS = 100_000, 500, 200


class _Operations(TorchDispatchMode):
    """Every operation that PyTorch runs, with the shapes it reads and writes: what time and memory depend on."""

    def __init__(self):
        super().__init__()
        self.operations: list[tuple] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        tensors = [t for t in tree_leaves((args, kwargs, result)) if isinstance(t, torch.Tensor)]
        self.operations.append((str(function), tuple((tuple(t.shape), t.dtype) for t in tensors)))
        return result


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sumagg-sinusoidal", "sumagg-sliding", "tost-sliding"])
def test_a_hundred_thousand_tokens(kind):
    model = tiny_model(kind)
    tokens = torch.randint(VOCAB_SIZE, (1, LENGTH))
    cache = DynamicCache(config=model.config)
    operations, num_bytes = [], []

    def decode(first: int, last: int) -> torch.Tensor:
        for t in range(first, last):
            logits = model(tokens[:, t : t + 1], cache=cache).logits
        with _Operations() as step:
            logits = model(tokens[:, last : last + 1], cache=cache).logits
        operations.append(step.operations)
        num_bytes.append(sum(t.nbytes for t in cache_to_tensors(cache).values()))
        return logits[0, -1]

    with torch.no_grad():
        decode(0, 2 * SLIDING_WINDOW)
        for start in range(2 * SLIDING_WINDOW + 1, LENGTH - NUM_STEPS, CHUNK):
            model(tokens[:, start : min(start + CHUNK, LENGTH - NUM_STEPS)], cache=cache, logits_to_keep=1)
        logits = decode(LENGTH - NUM_STEPS, LENGTH - 1)
    assert cache.get_seq_length() == LENGTH
    assert operations[0] == operations[1]
    assert num_bytes[0] == num_bytes[1]

    # In float64 and in one pass, 100,000 sums later.
    expected = logits_alone(tiny_model(kind, torch.float64), tokens[0].tolist())[-1]
    assert (logits - expected).abs().max() <= 1e-4 * expected.abs().max()
