"""When Python may read a tensor, and what the checks of ids and labels refuse."""

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.func import grad, jvp, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.functional import cross_entropy
from transformers import PreTrainedConfig

from modeling_sumagg.common.checks import check_ids, check_labels, is_concrete, labels_of_rows, loss_of_classes


ONES = torch.ones(3)


def traced(function):
    torch.jit.trace(function, (ONES,), check_trace=False)


def exported(function):
    class Module(torch.nn.Module):
        def forward(self, x):
            return function(x)

    torch.export.export(Module(), (ONES,))


def faked(function):
    with FakeTensorMode() as mode:
        function(mode.from_tensor(ONES))


NOT_CONCRETE = {
    "meta": lambda function: function(ONES.to("meta")),
    "fake": faked,
    "traced": traced,
    "compiled": lambda function: torch.compile(function, backend="eager", fullgraph=True)(ONES),
    "exported": exported,
    "proxies": lambda function: make_fx(function)(ONES),
    "vmap": lambda function: vmap(function)(ONES),
    "grad": lambda function: grad(function)(torch.tensor(1.0)),
    "vmap of grad": lambda function: vmap(grad(function))(ONES),
    "jvp": lambda function: jvp(function, (ONES,), (ONES,)),
}


@pytest.mark.parametrize("kind", NOT_CONCRETE)
def test_values_that_cannot_be_read(kind):
    seen = []

    def function(x):
        seen.append(is_concrete(x))
        check_ids("ids", x.long() + 7, 5, "rows")
        check_labels(x.long() + 7, x.shape, "[B]", 5)
        return x.sum()

    NOT_CONCRETE[kind](function)
    assert seen and not any(seen)


def test_values_that_can_be_read():
    parameter = torch.nn.Parameter(torch.ones(2))
    with torch.no_grad():
        assert is_concrete(parameter * 2)
    assert is_concrete(parameter * 2) and is_concrete(torch.zeros(0))


@pytest.mark.parametrize("ids", [torch.tensor([[0, 5]]), torch.tensor([-1, 3]), torch.tensor(9, dtype=torch.int32)])
def test_ids(ids):
    with pytest.raises(ValueError, match=rf"`ids` must be in \[0, 5\), rows, got .* to {ids.max().item()}\."):
        check_ids("ids", ids, 5, "rows")
    check_ids("ids", ids.clamp(0, 4), 5, "rows")
    check_ids("ids", ids.reshape(-1)[:0], 5, "rows")


@pytest.mark.parametrize("ignore_index", [-100, -1, 255])
def test_ignored_labels(ignore_index):
    def loss(first: int) -> torch.Tensor:
        labels = torch.tensor([first, ignore_index, 2])
        arguments = {"input": torch.eye(3), "ignore_index": ignore_index}
        return loss_of_classes(lambda labels, **kwargs: cross_entropy(target=labels, **kwargs), labels, 3, **arguments)

    expected = cross_entropy(torch.eye(3)[[0, 2]], torch.tensor([0, 2]))
    torch.testing.assert_close(loss(0), expected)
    with pytest.raises(ValueError, match=rf"\[0, 3\), or {ignore_index} to be ignored, got -7"):
        loss(-7)


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32, torch.bfloat16])
def test_labels_that_are_no_classes(dtype):
    labels = torch.ones(2, dtype=dtype)
    with pytest.raises(ValueError, match=f"`labels` are indices of 4 classes .*got {dtype}: pass `labels.long"):
        check_labels(labels, labels.shape, "[B]", 4)
    check_labels(labels, labels.shape, "[B]", None)


@pytest.mark.parametrize(
    ("problem_type", "num_labels", "labels", "expected"),
    [
        (None, 3, torch.tensor([2, 0], dtype=torch.int32), torch.tensor([2, 0])),
        (None, 3, torch.tensor([[True, False, True]] * 2), torch.tensor([[1.0, 0, 1]] * 2)),
        (None, 1, torch.tensor([2, 3]), torch.tensor([2.0, 3.0])),
        (None, 1, torch.tensor([[2.0], [3.0]], dtype=torch.float64), torch.tensor([[2.0], [3.0]])),
        ("regression", 3, torch.ones(2, 3).half(), torch.ones(2, 3)),
        ("multi_label_classification", 3, torch.ones(2, 3).long(), torch.ones(2, 3)),
        ("single_label_classification", 2, torch.zeros(2).byte(), torch.zeros(2).long()),
    ],
)
def test_labels_of_rows(problem_type, num_labels, labels, expected):
    config = PreTrainedConfig(num_labels=num_labels, problem_type=problem_type)
    actual = labels_of_rows(labels, torch.zeros(2, num_labels), config)
    assert actual.dtype == expected.dtype and torch.equal(actual, expected)
    with pytest.raises(ValueError, match="`labels` must have the shape"):
        labels_of_rows(labels, torch.zeros(5, num_labels), config)
