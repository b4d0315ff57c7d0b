"""The stacking of frames against a loop over the real frames of each row."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from modeling_sumagg.ops import stack_frames


def loop(x, size, stride, before, count, attention_mask):
    """The windows of each row and their numbers, and the state, frame by frame."""
    windows, states = [], []
    for row in range(x.shape[0]):
        frames, seen, own = list(before[row]), int(count[row]), []
        for frame in range(x.shape[1]):
            if not attention_mask[row, frame]:
                continue
            frames.append(x[row, frame])
            seen += 1
            if seen % stride == 0:
                own.append((seen // stride - 1, torch.stack(frames[-size:])))
        windows.append(own)
        states.append((frames[len(frames) - size + 1 :], seen))
    return windows, states


@settings(max_examples=150, derandomize=True, deadline=None)
@given(
    st.integers(1, 3),
    st.integers(0, 14),
    st.integers(1, 4),
    st.integers(0, 5),
    st.booleans(),
    st.booleans(),
    st.integers(0, 9),
)
def test_it_is_the_loop(batch, length, stride, more, masked, carried, seed):
    torch.manual_seed(seed)
    size = stride + more
    x = torch.randn(batch, length, 2)
    mask = torch.rand(batch, length) < 0.6 if masked else torch.ones(batch, length, dtype=torch.bool)
    state = torch.zeros(batch, size - 1, 2), torch.zeros(batch, dtype=torch.long)
    if carried:
        state = torch.randn(batch, size - 1, 2), torch.randint(0, 30, (batch,))
    expected, states = loop(x, size, stride, *state, mask)
    x = x.masked_fill(~mask[..., None], float("nan"))
    arguments = {"size": size, "stride": stride, "initial_state": state if carried else None}
    (windows, numbers), (before, count) = stack_frames(x, attention_mask=mask if masked else None, **arguments)
    assert windows.shape[1] == numbers.shape[1] == (length + stride - 1 if carried else length) // stride
    assert windows.isfinite().all()
    for row in range(batch):
        own = len(expected[row])
        assert numbers[row].tolist() == [number for number, _ in expected[row]] + [-1] * (numbers.shape[1] - own)
        for index, (_, window) in enumerate(expected[row]):
            assert torch.equal(windows[row, index], window)
        assert count[row] == states[row][1]
        assert before[row].shape[0] == size - 1
        assert all(map(torch.equal, before[row], states[row][0]))


@pytest.mark.parametrize("masked", [False, True])
def test_derivatives(masked):
    mask = torch.tensor([[1, 1, 0, 1, 1, 1], [0, 1, 1, 1, 1, 0]]) if masked else None
    x, before = (torch.randn(2, n, 2, dtype=torch.float64, requires_grad=True) for n in (6, 3))

    def function(x, before):
        state = before, torch.tensor([1, 6])
        (windows, numbers), (last, _) = stack_frames(x, size=4, stride=3, initial_state=state, attention_mask=mask)
        return windows.where(numbers[..., None, None] >= 0, 0), last

    assert torch.autograd.gradcheck(function, (x, before))


def test_a_convolution_with_a_stride_is_a_linear_map_of_it():
    x, weight = torch.randn(2, 23, 5, dtype=torch.float64), torch.randn(7, 5, 6, dtype=torch.float64)
    (windows, _), _ = stack_frames(x, size=6, stride=4)
    padded = torch.nn.functional.pad(x.transpose(1, 2), (2, 0))
    expected = torch.nn.functional.conv1d(padded, weight, stride=4).transpose(1, 2)
    torch.testing.assert_close(torch.einsum("bnkf,dfk->bnd", windows, weight), expected)


def test_errors():
    x = torch.zeros(2, 5, 3)
    with pytest.raises(ValueError, match=r"`x` must have the shape \[B, T, F\], got \[2, 5\]"):
        stack_frames(x[..., 0], size=4, stride=4)
    with pytest.raises(TypeError, match=r"floating dtype, got torch.int64"):
        stack_frames(x.long(), size=4, stride=4)
    with pytest.raises(ValueError, match="`size` at least `stride`, got 4 and 3"):
        stack_frames(x, size=3, stride=4)
    with pytest.raises(ValueError, match=r"the shapes \[2, 3, 3\] and \[2\], got \[2, 4, 3\] and \[2\]"):
        stack_frames(x, size=4, stride=4, initial_state=(torch.zeros(2, 4, 3), torch.zeros(2).long()))
    with pytest.raises(ValueError, match="`attention_mask` must have the shape"):
        stack_frames(x, size=4, stride=4, attention_mask=torch.ones(2, 4))
