"""The keyed sum against a loop in float64: values, gradients of both orders, padding, documents, segments, graphs."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from modeling_sumagg.ops import bidirectional_keyed_sum, causal_keyed_sum, causal_keyed_sum_reference


LEAVES = ("values", "keys", "queries", "log_decay", "weight", "initial_state")


def sample(length, *, batch=2, heads=4, groups=2, size=5, width=3, dtype=torch.float64, seed=0, cut=True):
    """Arguments of a call; with `cut` also padding and documents."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    def rand(*shape):
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    arguments = {
        "values": randn(batch, length, heads, width),
        "keys": randn(batch, length, groups, size),
        "queries": randn(batch, length, groups, size),
        "log_decay": (-2 * rand(batch, length, heads)).to(dtype),
        "weight": rand(batch, length, heads).to(dtype),
        "initial_state": randn(batch, heads, size, width),
    }
    if cut:
        arguments["attention_mask"] = rand(batch, length) < 0.8
        arguments["document_ids"] = (rand(batch, length) < 0.06).long().cumsum(1)
    return arguments


def real(y, arguments):
    mask = arguments.get("attention_mask")
    return y if mask is None else y * mask[..., None, None]


def gradients(operator, arguments):
    leaves = {name: arguments[name].clone().requires_grad_() for name in LEAVES if name in arguments}
    y, state = operator(**{**arguments, **leaves})
    weights = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)
    loss = (real(y, arguments) * weights).sum() + (state * state.detach().sin()).sum()
    return y, state, *torch.autograd.grad(loss, list(leaves.values()), materialize_grads=True)


def averaged(arguments):
    """The same call for the moving average, which takes no weights."""
    return {**{name: value for name, value in arguments.items() if name != "weight"}, "average": True}


@pytest.mark.parametrize("average", [False, True])
@pytest.mark.parametrize("cut", [False, True])
@pytest.mark.parametrize("length", [1, 2, 31, 32, 33, 100, 1100])
def test_outputs_and_gradients_are_those_of_the_loop(length, cut, average):
    arguments = sample(length, cut=cut)
    arguments = averaged(arguments) if average else arguments
    found, expected = gradients(causal_keyed_sum, arguments), gradients(causal_keyed_sum_reference, arguments)
    names = ("y", "state", *[name for name in LEAVES if name in arguments])
    for name, one, other in zip(names, found, expected, strict=True):
        one, other = (real(one, arguments), real(other, arguments)) if name == "y" else (one, other)
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10, msg=lambda text, name=name: f"{name}: {text}")


@given(data=st.data())
@settings(max_examples=25, deadline=None)
def test_any_shapes_masks_and_documents(data):
    draw = data.draw
    groups = draw(st.integers(1, 3))
    arguments = sample(
        draw(st.integers(0, 70)),
        batch=draw(st.integers(1, 3)),
        groups=groups,
        heads=groups * draw(st.integers(1, 3)),
        size=draw(st.integers(1, 6)),
        width=draw(st.integers(1, 6)),
        seed=draw(st.integers(0, 1000)),
        cut=draw(st.booleans()),
    )
    for name in ("weight", "initial_state", "attention_mask", "document_ids"):
        if name in arguments and draw(st.booleans()):
            del arguments[name]
    arguments = averaged(arguments) if draw(st.booleans()) else arguments
    y, state = causal_keyed_sum(**arguments)
    expected_y, expected_state = causal_keyed_sum_reference(**arguments)
    torch.testing.assert_close(real(y, arguments), real(expected_y, arguments), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(state, expected_state, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("cuts", [[1] * 70, [33, 37], [32, 1, 0, 37], [5, 64, 1]])
def test_segments_are_the_whole(cuts):
    arguments = sample(70)
    whole, last = causal_keyed_sum(**arguments)
    state, parts, begin = arguments["initial_state"], [], 0
    ids, mask = arguments["document_ids"], arguments["attention_mask"]
    seen: list = [None] * 2  # the document of the last real token of each row
    for length in cuts:
        part = slice(begin, begin + length)
        segment = {name: tensor if name == "initial_state" else tensor[:, part] for name, tensor in arguments.items()}
        for row in range(2):
            found = ids[row, part][mask[row, part]].tolist()
            if found and seen[row] is not None and found[0] != seen[row]:
                state = state.clone()
                state[row] = 0
            seen[row] = found[-1] if found else seen[row]
        y, state = causal_keyed_sum(**{**segment, "initial_state": state})
        parts.append(y)
        begin += length
    torch.testing.assert_close(torch.cat(parts, 1), whole)
    torch.testing.assert_close(state, last)


def test_segments_that_were_summed_apart_are_joined_by_their_decay():
    arguments = sample(80, cut=False)
    first, second = (
        {n: t if n == "initial_state" else t[:, p] for n, t in arguments.items()} for p in (slice(50), slice(50, 80))
    )
    _, before = causal_keyed_sum(**first)
    _, alone = causal_keyed_sum(**{**second, "initial_state": None})
    joined = second["log_decay"].sum(1).exp()[..., None, None] * before + alone
    torch.testing.assert_close(joined, causal_keyed_sum(**arguments)[1])


def test_a_document_inside_the_segment_lets_nothing_through():
    arguments = sample(40, cut=False)
    arguments["document_ids"] = (torch.arange(40) >= 20).long().expand(2, -1)
    _, expected = causal_keyed_sum(**{**arguments, "initial_state": None})
    torch.testing.assert_close(causal_keyed_sum(**arguments)[1], expected)


@pytest.mark.parametrize("average", [False, True])
@pytest.mark.parametrize("length", [1, 3, 40])
def test_gradcheck_of_both_orders(length, average):
    arguments = sample(length, batch=1, heads=2, groups=1, size=2, width=2)
    arguments = averaged(arguments) if average else arguments
    names = [name for name in LEAVES if name in arguments]
    leaves = [arguments[name].requires_grad_() for name in names]

    def of_leaves(*leaves):
        return causal_keyed_sum(**{**arguments, **dict(zip(names, leaves, strict=True))})

    torch.autograd.gradcheck(of_leaves, leaves, fast_mode=length > 3)
    torch.autograd.gradgradcheck(of_leaves, leaves, fast_mode=True)


def loop(values, keys, queries, log_decay, weight, initial_state):
    """One head of one row, in as few operations as a long row needs."""
    state, rows = initial_state[0, 0], []
    terms = (keys[0, :, 0, :, None] * (values * weight[..., None])[0, :, 0, None]).unbind(0)
    for decay, term, query in zip(log_decay[0, :, 0].exp().tolist(), terms, queries[0, :, 0].unbind(0), strict=True):
        state = decay * state + term
        rows.append(query @ state)
    return torch.stack(rows)[None, :, None], state[None, None]


def both_sides(**arguments):
    """A sum over all pairs of real tokens of a document, each decayed by the tokens from the nearer one to the reader."""
    values, keys, queries, log_decay, weight = (arguments[name] for name in LEAVES[:5])
    batch, length, heads, _ = values.shape
    mask = arguments.get("attention_mask", torch.ones(batch, length, dtype=torch.bool))
    ids = arguments.get("document_ids", torch.zeros(batch, length, dtype=torch.long))
    keys, queries = (t.repeat_interleave(heads // t.shape[2], 2) for t in (keys, queries))
    y = []
    for b, t in ((b, t) for b in range(batch) for t in range(length)):
        total = 0 * values[b, t]
        for u in range(length):
            if not (mask[b, t] and mask[b, u] and ids[b, t] == ids[b, u]):
                continue
            between = slice(u + 1, t + 1) if u < t else slice(t, u)
            decay = (log_decay[b, between] * mask[b, between, None]).sum(0).exp()
            share = decay * weight[b, u] * (queries[b, t] * keys[b, u]).sum(-1)
            total = total + share[:, None] * values[b, u]
        y.append(total)
    return torch.stack(y).view_as(values)


@pytest.mark.parametrize("cut", [False, True])
@pytest.mark.parametrize("length", [1, 2, 33])
def test_both_sides_are_the_sum_over_pairs(length, cut):
    arguments = sample(length, cut=cut)
    del arguments["initial_state"]
    if cut:
        arguments["document_ids"] = torch.arange(length).expand(2, -1) // 9
    leaves = {name: arguments[name].clone().requires_grad_() for name in LEAVES[:5]}
    found = []
    for operator in (bidirectional_keyed_sum, both_sides):
        y = operator(**{**arguments, **leaves})
        weights = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)
        grads = torch.autograd.grad((y * weights).sum(), list(leaves.values()), materialize_grads=True)
        found.append((y, *grads))
    for name, one, other in zip(("y", *leaves), *found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("decay", [1e-6, 0.5, 0.999, 1 - 1e-6])
def test_long_rows_in_float32(decay):
    arguments = sample(16_384, batch=1, heads=1, groups=1, size=4, width=4, cut=False)
    arguments["log_decay"] = torch.full_like(arguments["log_decay"], decay).log()
    # The weight that keeps the outputs of one size, whatever the decay.
    arguments["weight"] = torch.full_like(arguments["weight"], (1 - decay * decay) ** 0.5)
    expected, expected_state = loop(**arguments)
    y, state = causal_keyed_sum(**{name: tensor.float() for name, tensor in arguments.items()})
    assert (y - expected).abs().max() / expected.abs().max() < 5e-6
    assert (state - expected_state).abs().max() / expected_state.abs().max() < 5e-6


def test_mixed_decays_in_one_chunk_in_float32():
    arguments = sample(64, batch=1, heads=2, groups=1, cut=False)
    # Decays of 1e-6 and of 1 - 1e-6 by turns: a difference of two long sums in float32 would lose the second.
    decays = torch.tensor([1e-6, 1 - 1e-6], dtype=torch.float64).repeat(32)[:, None].expand(1, -1, 2)
    arguments["log_decay"] = decays.log()
    expected = causal_keyed_sum_reference(**arguments)
    found = causal_keyed_sum(**{name: tensor.float() for name, tensor in arguments.items()})
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_a_stream_of_a_million_tokens_in_float32():
    length, pieces = 16_384, 61
    state = exact = torch.zeros(1, 1, 4, 4)
    for seed in range(pieces):
        arguments = sample(length, batch=1, heads=1, groups=1, size=4, width=4, cut=False, seed=seed)
        arguments |= {"log_decay": torch.full_like(arguments["log_decay"], -1e-6), "weight": None}
        y, state = causal_keyed_sum(
            **{n: t if t is None else t.float() for n, t in arguments.items()} | {"initial_state": state}
        )
        expected, exact = causal_keyed_sum(**{**arguments, "initial_state": exact.double()})
    assert (y - expected).abs().max() / expected.abs().max() < 1e-5
    assert (state - exact).abs().max() / exact.abs().max() < 1e-5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_is_rounded_once(dtype):
    arguments = sample(200, dtype=dtype)
    # Products of keys and queries that float16 cannot hold.
    arguments["keys"], arguments["queries"] = 300 * arguments["keys"], 300 * arguments["queries"]
    arguments["values"] = arguments["values"] / 1e4
    y, state = causal_keyed_sum(**arguments)
    expected, _ = causal_keyed_sum_reference(
        **{n: t.double() if t.is_floating_point() else t for n, t in arguments.items()}
    )
    assert (y.dtype, state.dtype) == (dtype, torch.float32)
    torch.testing.assert_close(
        real(y, arguments).double(), real(expected, arguments), rtol=torch.finfo(dtype).eps, atol=1e-3
    )
    assert y.isfinite().all()


def test_autocast_changes_nothing():
    arguments = {n: t.float() if t.is_floating_point() else t for n, t in sample(50).items()}
    expected = causal_keyed_sum(**arguments)
    with torch.autocast("cpu", torch.bfloat16):
        found = causal_keyed_sum(**arguments)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("name", ["values", "keys", "queries", "log_decay", "initial_state"])
def test_a_value_that_is_not_finite_stays_in_its_document(name, bad):
    arguments = sample(90, cut=False)
    arguments["document_ids"] = torch.arange(90).div(30, rounding_mode="floor").expand(2, -1)
    expected, expected_state = causal_keyed_sum(**arguments)
    damaged = arguments[name].clone()
    if name == "initial_state":
        damaged[0, 0, 0, 0] = bad
    else:
        damaged[0, 10] = bad if name != "log_decay" else torch.nan
    y, state = causal_keyed_sum(**{**arguments, name: damaged})
    assert not y[0, 10].isfinite().all()
    torch.testing.assert_close(y[0, 30:], expected[0, 30:])
    torch.testing.assert_close(y[1], expected[1])
    torch.testing.assert_close(state, expected_state)
    # In the last document it reaches the state, but for a query, which only reads.
    arguments["document_ids"] = torch.zeros_like(arguments["document_ids"])
    arguments["document_ids"][:, 5:] = 1
    if name not in ("queries", "initial_state"):
        assert not causal_keyed_sum(**{**arguments, name: damaged})[1][0].isfinite().all()


def test_padding_may_hold_anything():
    arguments = sample(70)
    expected = gradients(causal_keyed_sum, arguments)
    padding = ~arguments["attention_mask"]
    for name in LEAVES[:-1]:
        arguments[name] = arguments[name].clone()
        arguments[name][padding] = torch.nan
    found = gradients(causal_keyed_sum, arguments)
    for name, one, other in zip(("y", "state", *LEAVES), found, expected, strict=True):
        if name in LEAVES[:-1]:
            assert one[padding].eq(0).all(), name
        assert torch.equal(one, other), name


def test_gradients_in_a_batch_and_forward_mode():
    arguments = sample(34, batch=1, heads=1, groups=1, size=2, width=2)

    def of_values(values):
        return causal_keyed_sum(**{**arguments, "values": values})[0]

    values = arguments["values"]
    rows = torch.autograd.functional.jacobian(of_values, values)
    vectorized = torch.autograd.functional.jacobian(of_values, values, vectorize=True)
    torch.testing.assert_close(vectorized, rows)
    tangent = torch.ones_like(values)
    _, forward = torch.func.jvp(of_values, (values,), (tangent,))
    torch.testing.assert_close(forward, (rows * tangent).sum(tuple(range(4, 8))))


@pytest.mark.slow
def test_one_compiled_graph_serves_every_length():
    compiled = torch.compile(causal_keyed_sum, fullgraph=True, dynamic=True, backend="aot_eager")
    for length in (2, 40, 97):
        arguments = sample(length)
        found, expected = gradients(compiled, arguments), gradients(causal_keyed_sum, arguments)
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


def test_one_exported_graph_serves_every_length():
    class Operator(torch.nn.Module):
        def forward(self, arguments):
            return causal_keyed_sum(**arguments)

    length = torch.export.Dim("length", min=2)
    arguments = sample(40)
    shapes = {name: None if name == "initial_state" else {1: length} for name in arguments}
    exported = torch.export.export(Operator(), (arguments,), dynamic_shapes=(shapes,)).module()
    for other in (2, 40, 97):
        arguments = sample(other)
        for one, two in zip(exported(arguments), causal_keyed_sum(**arguments), strict=True):
            torch.testing.assert_close(one, two)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"values": torch.zeros(2, 9, 4)},
            ValueError,
            r"`values` must have the shape \[B, T, K, P\], got \[2, 9, 4\]",
        ),
        ({"keys": torch.zeros(2, 9, 3, 5)}, ValueError, r"`keys`.*G divides the 4 heads.*got \[2, 9, 3, 5\]"),
        ({"queries": torch.zeros(2, 9, 2, 4)}, ValueError, r"`queries`.*\[2, 9, 2, 5\] of `keys`, got \[2, 9, 2, 4\]"),
        ({"log_decay": torch.zeros(2, 9, 2)}, ValueError, r"`log_decay`.*\[2, 9, 4\].*got \[2, 9, 2\]"),
        ({"average": True}, ValueError, "leave out `weight`"),
        ({"weight": torch.zeros(9, 4)}, ValueError, r"`weight`.*got \[9, 4\]"),
        (
            {"initial_state": torch.zeros(2, 4, 3, 5)},
            ValueError,
            r"`initial_state`.*\[2, 4, 5, 3\], got \[2, 4, 3, 5\]",
        ),
        ({"attention_mask": torch.ones(2, 8)}, ValueError, r"`attention_mask`.*\[2, 9\] of `values`, got \[2, 8\]"),
        ({"document_ids": torch.zeros(2, 9)}, TypeError, "`document_ids` must be of an integer dtype"),
        ({"values": torch.zeros(2, 9, 4, 3).long()}, TypeError, "`values` must be of a floating dtype"),
    ],
)
def test_what_does_not_fit_is_named(change, error, message):
    with pytest.raises(error, match=message):
        causal_keyed_sum(**{**sample(9, dtype=torch.float32), **change})
