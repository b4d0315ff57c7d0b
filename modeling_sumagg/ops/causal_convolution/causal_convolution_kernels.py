"""The causal convolution of a window as Triton kernels: its outputs, and the gradients of its inputs and of its weights.

A program has a tile of tokens of some channels, of which it reads a row for each tap: all but the first come from the cache.
"""

import torch

from ..dispatch import register_kernel
from ..triton_helpers import MIN_BLOCK, contiguous, convert, given, num_processors, on_its_device, tl, triton
from .causal_convolution import causal_convolution
from .causal_convolution_torch import convolution_gradients


BLOCK_T = 32  # tokens of a tile
BLOCK_D = 128  # channels of a tile, at most


@triton.jit
def load_of_document(x_ptr, ids_ptr, token, own, is_there, in_channels, D, dtype: tl.constexpr, HAS_IDS: tl.constexpr):
    """Rows of `x` where they are there, and of documents `own`; 0 elsewhere, whatever stands there."""
    if HAS_IDS:
        is_there &= tl.load(ids_ptr + token, mask=is_there, other=0) == own
    x = tl.load(x_ptr + token[:, None] * D, mask=is_there[:, None] & in_channels[None, :], other=0.0)
    return convert(x, dtype)


@triton.jit
def convolution_kernel(
    x_ptr,  # [B, past + T, D], the window; in reverse the gradient of the outputs [B, T, D]
    weight_ptr,  # [taps, D], its dtype is that of the products
    bias_ptr,  # [D]
    ids_ptr,  # [B, past + T]
    y_ptr,  # [B, T, D]; in reverse the gradient of the window [B, past + T, D]
    T,
    D,
    TAPS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_IDS: tl.constexpr,
    REVERSE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    past: tl.constexpr = TAPS - 1
    out_length = T + past if REVERSE else T
    in_length = T if REVERSE else T + past
    tiles, stripes = tl.cdiv(out_length, BLOCK_T), tl.cdiv(D, BLOCK_D)
    batch = (tl.program_id(0) // tiles // stripes).to(tl.int64)
    channel = (tl.program_id(0) // tiles % stripes) * BLOCK_D + tl.arange(0, BLOCK_D)
    token = (tl.program_id(0) % tiles).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    in_channels = channel < D
    dtype = weight_ptr.dtype.element_ty
    x_ptr += batch * in_length * D + channel[None, :]
    ids_ptr += batch * (T + past)

    own = token
    if HAS_IDS:
        own = tl.load(ids_ptr + (token if REVERSE else token + past), mask=token < out_length, other=0)
    y = tl.zeros([BLOCK_T, BLOCK_D], dtype)
    if HAS_BIAS:
        y += tl.load(bias_ptr + channel, mask=in_channels, other=0.0).to(dtype)[None, :]
    for tap in tl.static_range(TAPS):
        source = token - tap if REVERSE else token + tap
        is_there = (source >= 0) & (source < in_length)
        # The ids are those of the window, in which the gradients begin after what is before.
        ids = ids_ptr + past if REVERSE else ids_ptr
        x = load_of_document(x_ptr, ids, source, own, is_there, in_channels, D, dtype, HAS_IDS)
        y += tl.load(weight_ptr + tap * D + channel, mask=in_channels, other=0.0)[None, :] * x
    y_ptr += batch * out_length * D + channel[None, :]
    inside = (token < out_length)[:, None] & in_channels[None, :]
    tl.store(y_ptr + token[:, None] * D, convert(y, y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def weight_gradient_kernel(
    window_ptr,  # [B, past + T, D]
    grad_ptr,  # [B, T, D]
    ids_ptr,  # [B, past + T]
    out_ptr,  # [B, segments, taps + 1, D], of its dtype; the last row is that of the bias
    T,
    D,
    segment_tiles,
    TAPS: tl.constexpr,
    HAS_IDS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    past: tl.constexpr = TAPS - 1
    stripes = tl.cdiv(D, BLOCK_D)
    batch = (tl.program_id(0) // stripes).to(tl.int64)
    channel = (tl.program_id(0) % stripes) * BLOCK_D + tl.arange(0, BLOCK_D)
    segment = tl.program_id(1)
    in_channels = channel < D
    dtype = out_ptr.dtype.element_ty
    window_ptr += batch * (T + past) * D + channel[None, :]
    grad_ptr += batch * T * D + channel[None, :]
    ids_ptr += batch * (T + past)
    out_ptr += (batch * tl.num_programs(1) + segment) * (TAPS + 1) * D + channel

    # A pass for each tap: the tile of gradients stays in the cache.
    for tap in tl.static_range(TAPS + 1):
        total = tl.zeros([BLOCK_D], dtype)
        for i in range(0, segment_tiles):
            token = (segment * segment_tiles + i).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
            is_there = token < T
            grad = tl.load(grad_ptr + token[:, None] * D, mask=is_there[:, None] & in_channels[None, :], other=0.0)
            grad = convert(grad, dtype)
            if tap < TAPS:
                own = token
                if HAS_IDS:
                    own = tl.load(ids_ptr + token + past, mask=is_there, other=0)
                grad *= load_of_document(
                    window_ptr, ids_ptr, token + tap, own, is_there, in_channels, D, dtype, HAS_IDS
                )
            total += tl.sum(grad, 0)
        tl.store(out_ptr + tap * D, total, mask=in_channels)


@on_its_device
def launch_convolution(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    ids: torch.Tensor | None,
    *,
    reverse: bool = False,
) -> torch.Tensor:
    """
    The convolution of a window `[B, taps - 1 + T, D]`, `[B, T, D]`; with `reverse` from the gradient of that the one of the
    window.

    Args:
        x (`torch.Tensor`): the window, or the gradient; of any floating dtype, which is that of the result, rounded once.
        weight (`torch.Tensor` of shape `[D, taps]`), bias (`torch.Tensor` of shape `[D]`, *optional*): float32 or
            float64, in which the products are added.
        ids (`torch.Tensor` of shape `[B, taps - 1 + T]`, integer, *optional*): the documents of the window.
    """
    taps = weight.shape[1]
    batch_size, length, hidden_size = x.shape
    length -= 0 if reverse else taps - 1
    out_length = length + taps - 1 if reverse else length
    x, weight, bias, ids = contiguous(x, weight.T, bias, ids)
    y = x.new_empty(batch_size, out_length, hidden_size)
    block_d = min(BLOCK_D, max(MIN_BLOCK, triton.next_power_of_2(hidden_size)))
    programs = batch_size * triton.cdiv(hidden_size, block_d) * triton.cdiv(out_length, BLOCK_T)
    convolution_kernel[(programs,)](
        x,
        weight,
        *given(bias, ids, instead=x),
        y,
        length,
        hidden_size,
        TAPS=taps,
        HAS_BIAS=bias is not None,
        HAS_IDS=ids is not None,
        REVERSE=reverse,
        BLOCK_T=BLOCK_T,
        BLOCK_D=block_d,
    )
    return y


@on_its_device
def launch_weight_gradient(
    window: torch.Tensor, grad: torch.Tensor, ids: torch.Tensor | None, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Of [`launch_convolution`], from the gradient of its outputs those of its weights `[D, taps]` and its bias `[D]`, of `dtype`."""
    batch_size, length, hidden_size = grad.shape
    taps = window.shape[1] - length + 1
    window, grad, ids = contiguous(window, grad, ids)
    block_d = min(BLOCK_D, max(MIN_BLOCK, triton.next_power_of_2(hidden_size)))
    programs = batch_size * triton.cdiv(hidden_size, block_d)
    num_tiles = triton.cdiv(length, BLOCK_T)
    segments = max(1, min(num_tiles, triton.cdiv(4 * num_processors(grad.device), programs)))
    segment_tiles = triton.cdiv(num_tiles, segments)
    segments = triton.cdiv(num_tiles, segment_tiles)
    parts = torch.empty(batch_size, segments, taps + 1, hidden_size, dtype=dtype, device=grad.device)
    weight_gradient_kernel[programs, segments](
        window,
        grad,
        *given(ids, instead=window),
        parts,
        length,
        hidden_size,
        segment_tiles,
        TAPS=taps,
        HAS_IDS=ids is not None,
        BLOCK_T=BLOCK_T,
        BLOCK_D=block_d,
    )
    total = parts.sum((0, 1))
    return total[:-1].T.contiguous(), total[-1]


@register_kernel(causal_convolution)
@torch.library.custom_op("modeling_sumagg::convolution", mutates_args=())
def convolution(
    window: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, ids: torch.Tensor | None
) -> torch.Tensor:
    """[`launch_convolution`] for autograd and compilers."""
    return launch_convolution(window, weight, bias, ids)


@convolution.register_fake
def _convolution_fake(window, weight, bias, ids):
    return window.new_empty(window.shape[0], window.shape[1] - weight.shape[1] + 1, window.shape[2])


@torch.library.custom_op("modeling_sumagg::convolution_backward", mutates_args=())
def convolution_backward(
    grad: torch.Tensor, window: torch.Tensor, weight: torch.Tensor, ids: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradients of the window, the weights and the bias."""
    grad_window = launch_convolution(grad, weight, None, ids, reverse=True)
    return grad_window, *launch_weight_gradient(window, grad, ids, weight.dtype)


@convolution_backward.register_fake
def _convolution_backward_fake(grad, window, weight, ids):
    grad_weight = torch.empty_like(weight, memory_format=torch.contiguous_format)
    return window.new_empty(window.shape), grad_weight, weight.new_empty(weight.shape[0])


def _convolution_setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _convolution_vjp(ctx, grad):
    window, weight, bias, ids = ctx.saved_tensors
    if torch.is_grad_enabled():
        return *convolution_gradients(grad, window, weight, bias, ids), None
    grad_window, grad_weight, grad_bias = convolution_backward(grad, window, weight, ids)
    return grad_window, grad_weight, None if bias is None else grad_bias, None


convolution.register_autograd(_convolution_vjp, setup_context=_convolution_setup_context)
