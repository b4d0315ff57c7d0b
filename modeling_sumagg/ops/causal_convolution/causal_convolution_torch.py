"""The causal convolution in PyTorch's operations."""

import torch

from ..dispatch import is_transformed


def convolution_by_taps(
    window: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    ids: torch.Tensor | None,
    in_place: bool = False,
) -> torch.Tensor:
    """
    A pass for each tap, on a CPU faster than PyTorch's depthwise convolution.

    Args:
        window (`torch.Tensor` of shape `[B, k - 1 + T, D]`), weight (`[D, k]`), bias (`[D]`, *optional*): the weights in the
            dtype of the sums.
        ids (`torch.Tensor` of shape `[B, k - 1 + T]`, *optional*): the documents of the window.
        in_place (`bool`): add to one tensor, where nothing needs the sums before.
    """
    y = torch.zeros_like(weight[:, 0]) if bias is None else bias
    # With a stride between its channels a weight would make a pass ten times as long.
    for tap, (w, (x, other)) in enumerate(
        zip(weight.T.contiguous(), _taps(window, ids, weight.shape[1]), strict=True)
    ):
        x = x.to(weight.dtype)
        x = x if other is None else x.masked_fill(other, 0)
        y = y.addcmul_(x, w) if in_place and tap else torch.addcmul(y, x, w)
    return y.to(window.dtype)


def _taps(window, ids, taps):
    """For each tap what it multiplies `[B, T, D]`, and where that is of another document `[B, T, 1]` (`None`: nowhere)."""
    length = window.shape[1] - taps + 1
    for tap in range(taps):
        is_other = None
        if ids is not None and tap < taps - 1:
            is_other = (ids[:, tap : tap + length] != ids[:, taps - 1 :])[..., None]
        yield window[:, tap : tap + length], is_other


class Convolution(torch.autograd.Function):
    """[`convolution_by_taps`], which keeps nothing but its window for backward."""

    @staticmethod
    def forward(ctx, window, weight, bias, ids):
        ctx.save_for_backward(window, weight, bias, ids)
        return convolution_by_taps(window, weight, bias, ids, in_place=True)

    @staticmethod
    def backward(ctx, grad):
        window, weight, bias, ids = ctx.saved_tensors
        if torch.is_grad_enabled() or is_transformed(grad):
            return *convolution_gradients(grad, window, weight, bias, ids), None
        grad = grad.to(weight.dtype)
        grad_window = torch.zeros_like(window, dtype=weight.dtype)
        product, grad_weight = torch.empty_like(grad), []
        for tap, (x, other) in enumerate(_taps(window, ids, weight.shape[1])):
            torch.mul(grad, x, out=product)
            part = grad if other is None else grad.masked_fill(other, 0)
            grad_weight.append((product if other is None else product.masked_fill_(other, 0)).sum((0, 1)))
            grad_window[:, tap : tap + grad.shape[1]].addcmul_(part, weight[:, tap].contiguous())
        grad_bias = None if bias is None else grad.sum((0, 1))
        return grad_window.to(window.dtype), torch.stack(grad_weight, 1), grad_bias, None


def convolution_gradients(grad, window, weight, bias, ids):
    """Of the window, the weights and the bias (`None` where there is none), with gradients in turn."""
    window, weight, bias = (
        leaf if leaf is None or leaf.requires_grad else leaf.detach().requires_grad_()
        for leaf in (window, weight, bias)
    )
    with torch.enable_grad():
        y = convolution_by_taps(window, weight, bias, ids)
    leaves = [leaf for leaf in (window, weight, bias) if leaf is not None]
    return *torch.autograd.grad(y, leaves, grad, create_graph=True), *([None] if bias is None else [])


def compact(x, state, mask):
    """
    Put the real tokens of a row directly behind the state.

    Args:
        x (`torch.Tensor` of shape `[B, T, D]`), state (`[B, k - 1, D]`), mask (`[B, T]`, bool): the real tokens.

    Returns:
        `tuple`: the window `[B, k - 1 + T, D]`, zero behind the last real token; and the number of real tokens up to each
        token, `[B, T]`.
    """
    rank = mask.long().cumsum(dim=1)
    return torch.cat([state, behind_one_another(x, rank, mask)], dim=1), rank


def behind_one_another(x, rank, mask):
    """The real ones of `x` `[B, T, ...]` in the order of the row, then zeros."""
    shape = rank.shape + (1,) * (x.dim() - 2)
    # Column 0 takes all that is masked.
    columns = (rank * mask).view(shape).expand_as(x)
    return torch.zeros_like(torch.cat([x, x[:, :1]], dim=1)).scatter(1, columns, x)[:, 1:]


def ids_of_window(ids: torch.Tensor, past: int) -> torch.Tensor:
    """The documents `[B, past + T]` of a window, whose inputs before the tokens belong to the first of the `ids` `[B, T]`."""
    return torch.cat([ids[:, :1].expand(-1, past), ids], dim=1)


def inputs_of_last_document(last: torch.Tensor, ids: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """The inputs `last` `[B, k - 1, D]` before token `counts` `[B, 1]`, zero where they belong to an earlier document."""
    past = last.shape[1]
    ids = ids_of_window(ids, past).gather(1, counts + torch.arange(past, device=ids.device))
    return last.masked_fill((ids != ids[:, -1:])[..., None], 0)


def of_channels(columns: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return columns[..., None].expand(-1, -1, x.shape[2])
