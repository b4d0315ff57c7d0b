"""Short causal convolution, one kernel for each channel, over the real tokens of a document."""

import torch

from .batched_gradients import one_by_one
from .documents import check_tokens, find_documents
from .kernels.kernel_dispatch import is_recorded, is_transformed, kernel, takes_kernels


def causal_convolution(
    x: torch.Tensor,
    *,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    initial_state: torch.Tensor | None = None,
    attention_mask: torch.Tensor | None = None,
    document_ids: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Depthwise causal convolution, `y_t = b + sum_i w_i x_{t - k + 1 + i}` over `i = 0 … k - 1`, elementwise.

    Only real tokens of the same document count as tokens before `t`; before the first there are zeros.

    Args:
        x (`torch.Tensor` of shape `[B, T, D]`, any floating dtype): the inputs.
        weight (`torch.Tensor` of shape `[D, k]`): the kernel of each channel, the newest token last; `k >= 2`.
        bias (`torch.Tensor` of shape `[D]`, *optional*): b.
        initial_state (`torch.Tensor` of shape `[B, k - 1, D]` or `[B, R, k - 1, D]`, *optional*): the `k - 1` inputs
            before the first token, of the document of the first real token; or those of the `R` documents of a row, whose
            `document_ids` are then 0 … R - 1 and whose tokens stand together. Zero if not given.
        attention_mask (`torch.Tensor` of shape `[B, T]`, bool or 0/1, *optional*): True where a token is real.
        document_ids (`torch.Tensor` of shape `[B, T]`, integer, *optional*): a change of id from one real token to the next
            begins another document.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: `y` `[B, T, D]` in the dtype of `x`, computed in float32 at least and rounded
        once; and the last `k - 1` inputs, of the shape of the initial state, in the dtype of `x`.

    Raises:
        `TypeError`: `x` is not floating, or `document_ids` is not integer.
        `ValueError`: a shape does not fit `x`, or there is an `initial_state` for each document and no `document_ids`.
    """
    if x.dim() != 3 or weight.dim() != 2 or weight.shape[0] != x.shape[2] or weight.shape[1] < 2:
        raise ValueError(
            f"`x` must have the shape [B, T, D] and `weight` [D, k] with k >= 2, got {list(x.shape)} and "
            f"{list(weight.shape)}."
        )
    if not x.is_floating_point():
        raise TypeError(f"`x` must be of a floating dtype, got {x.dtype}.")
    batch_size, length, hidden_size = x.shape
    check_tokens("x", batch_size, length, attention_mask, document_ids)
    past = weight.shape[1] - 1
    if initial_state is None:
        initial_state = x.new_zeros(batch_size, past, hidden_size)
    elif (
        initial_state.dim() not in (3, 4)
        or initial_state.shape[0] != batch_size
        or initial_state.shape[-2:] != (past, hidden_size)
    ):
        raise ValueError(
            f"`initial_state` must have the shape [{batch_size}, {past}, {hidden_size}], or [{batch_size}, R, {past}, "
            f"{hidden_size}] for the R documents of a row, got {list(initial_state.shape)}."
        )
    state = initial_state.to(x.dtype)
    mask = None if attention_mask is None else attention_mask.bool()
    documents = find_documents(document_ids, mask, have_states=state.dim() == 4)
    if length == 0:
        return x, state
    ids = None
    if documents is not None and state.dim() == 3 and length > 1:
        ids = documents.starts.long().cumsum(dim=1)
    if state.dim() == 3 and (mask is None or length == 1):
        window = torch.cat([state, x], dim=1)
        y, last = _convolve(window, weight, bias, ids), window[:, length:]
        if mask is not None:
            last = torch.where(mask[..., None], last, state)
        elif ids is not None:
            last = _of_last_document(last, ids, ids.new_full((batch_size, 1), length))
        # A copy: a slice would keep the whole window in memory as long as the state.
        return y, last.clone()

    # The real tokens behind one another, those of each state behind it; column 0 takes what is masked.
    states = state if state.dim() == 4 else state[:, None]
    real = x.new_ones(x.shape[:2], dtype=torch.bool) if mask is None else mask
    owners = None if documents is None else documents.state_ids
    owners = torch.zeros_like(real, dtype=torch.long) if owners is None else owners
    counts = real.new_zeros(batch_size, states.shape[1], dtype=torch.long).scatter_add(1, owners, real.long())
    steps = torch.arange(states.shape[1] * past, device=x.device).unflatten(0, (-1, past))
    first = 1 + (counts.cumsum(dim=1) - counts)[..., None] + steps
    columns = torch.where(real, real.long().cumsum(dim=1) + (owners + 1) * past, 0)
    window = x.new_zeros(batch_size, 1 + states.shape[1] * past + length, hidden_size)
    window = window.scatter(1, _channels(columns, x), x)
    window = window.scatter(1, _channels(first.flatten(1), x), states.flatten(1, 2))[:, 1:]
    if ids is not None:
        compact = torch.zeros_like(torch.cat([ids[:, :1], ids], dim=1))
        ids = compact.scatter(1, (columns - past).clamp(min=0), ids)[:, 1:]
    y = _convolve(window, weight, bias, ids).gather(1, _channels((columns - past - 1).clamp(min=0), x))
    last = window.gather(1, _channels((first + counts[..., None] - 1).flatten(1), x)).unflatten(1, states.shape[1:3])
    if state.dim() == 4:
        return y, last
    return y, last[:, 0] if ids is None else _of_last_document(last[:, 0], ids, counts)


def _convolve(
    window: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, ids: torch.Tensor | None
) -> torch.Tensor:
    """The convolution of a window `[B, k - 1 + T, D]`, `[B, T, D]`; what is before belongs to the first of the `ids`."""
    past = weight.shape[1] - 1
    dtype = torch.promote_types(window.dtype, torch.float32)
    weight, bias = weight.to(dtype), None if bias is None else bias.to(dtype)
    if window.shape[1] == 1 + past:
        y = (window.to(dtype) * weight.T).sum(dim=1, keepdim=True)
        return (y if bias is None else y + bias).to(window.dtype)
    if ids is not None:
        ids = _of_window(ids, past)
    if takes_kernels(window):
        return kernel("convolution")(window, weight, bias, ids)
    plain = is_recorded() or is_transformed()
    return convolution_by_taps(window, weight, bias, ids) if plain else _Convolution.apply(window, weight, bias, ids)


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


class _Convolution(torch.autograd.Function):
    """[`convolution_by_taps`], which keeps nothing but its window for backward."""

    @staticmethod
    def forward(ctx, window, weight, bias, ids):
        ctx.save_for_backward(window, weight, bias, ids)
        return convolution_by_taps(window, weight, bias, ids, in_place=True)

    @staticmethod
    @one_by_one
    def backward(ctx, grad):
        window, weight, bias, ids = ctx.saved_tensors
        if torch.is_grad_enabled():
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


def _of_window(ids: torch.Tensor, past: int) -> torch.Tensor:
    """The documents `[B, past + T]` of a window: what is before the tokens belongs to the first of their `ids` `[B, T]`."""
    return torch.cat([ids[:, :1].expand(-1, past), ids], dim=1)


def _of_last_document(last: torch.Tensor, ids: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """The inputs `last` `[B, k - 1, D]` before token `counts` `[B, 1]`, zero where they belong to an earlier document."""
    past = last.shape[1]
    ids = _of_window(ids, past).gather(1, counts + torch.arange(past, device=ids.device))
    return last.masked_fill((ids != ids[:, -1:])[..., None], 0)


def _channels(columns: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return columns[..., None].expand(-1, -1, x.shape[2])
