"""The causal convolution of a window as Triton kernels: its outputs, and the gradients of its inputs and of its weights.

A program has a tile of tokens of some channels, of which it reads a row for each tap: all but the first come from the cache.
"""

import torch

from .running_sum_kernels import channels_last, convert, num_processors, on_its_device


try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError(f"The kernels need Triton, which cannot be imported ({error}). Install `triton`.") from error


BLOCK_T = 32  # tokens of a tile
BLOCK_D = 128  # channels of a tile, at most


@triton.jit
def load_of_document(
    x_ptr, ids_ptr, token, own, is_there, in_channels, stride_t, dtype: tl.constexpr, HAS_IDS: tl.constexpr
):
    """Rows of `x` where they are there, and of documents `own`; 0 elsewhere, whatever stands there."""
    if HAS_IDS:
        is_there &= tl.load(ids_ptr + token, mask=is_there, other=0) == own
    x = tl.load(x_ptr + token[:, None] * stride_t, mask=is_there[:, None] & in_channels[None, :], other=0.0)
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
    x_stride_b,
    x_stride_t,
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
    x_ptr += batch * x_stride_b + channel[None, :]
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
        x = load_of_document(x_ptr, ids, source, own, is_there, in_channels, x_stride_t, dtype, HAS_IDS)
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
    window_stride_b,
    window_stride_t,
    grad_stride_b,
    grad_stride_t,
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
    window_ptr += batch * window_stride_b + channel[None, :]
    grad_ptr += batch * grad_stride_b + channel[None, :]
    ids_ptr += batch * (T + past)
    out_ptr += (batch * tl.num_programs(1) + segment) * (TAPS + 1) * D + channel

    # A pass for each tap: the tile of gradients stays in the cache.
    for tap in tl.static_range(TAPS + 1):
        total = tl.zeros([BLOCK_D], dtype)
        for i in range(0, segment_tiles):
            token = (segment * segment_tiles + i).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
            is_there = token < T
            grad = tl.load(
                grad_ptr + token[:, None] * grad_stride_t, mask=is_there[:, None] & in_channels[None, :], other=0.0
            )
            grad = convert(grad, dtype)
            if tap < TAPS:
                own = token
                if HAS_IDS:
                    own = tl.load(ids_ptr + token + past, mask=is_there, other=0)
                grad *= load_of_document(
                    window_ptr, ids_ptr, token + tap, own, is_there, in_channels, window_stride_t, dtype, HAS_IDS
                )
            total += tl.sum(grad, 0)
        tl.store(out_ptr + tap * D, total, mask=in_channels)


@on_its_device
def convolution(
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
    x, weight = channels_last(x), weight.T.contiguous()
    y = x.new_empty(batch_size, out_length, hidden_size)
    block_d = min(BLOCK_D, max(16, triton.next_power_of_2(hidden_size)))
    programs = batch_size * triton.cdiv(hidden_size, block_d) * triton.cdiv(out_length, BLOCK_T)
    convolution_kernel[(programs,)](
        x,
        weight,
        weight if bias is None else bias.contiguous(),
        x if ids is None else ids.contiguous(),
        y,
        length,
        hidden_size,
        *x.stride()[:2],
        TAPS=taps,
        HAS_BIAS=bias is not None,
        HAS_IDS=ids is not None,
        REVERSE=reverse,
        BLOCK_T=BLOCK_T,
        BLOCK_D=block_d,
    )
    return y


@on_its_device
def convolution_weight_gradient(
    window: torch.Tensor, grad: torch.Tensor, ids: torch.Tensor | None, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Of [`convolution`], from the gradient of its outputs those of its weights `[D, taps]` and its bias `[D]`, of `dtype`."""
    batch_size, length, hidden_size = grad.shape
    taps = window.shape[1] - length + 1
    window, grad = channels_last(window), channels_last(grad)
    block_d = min(BLOCK_D, max(16, triton.next_power_of_2(hidden_size)))
    programs = batch_size * triton.cdiv(hidden_size, block_d)
    num_tiles = triton.cdiv(length, BLOCK_T)
    segments = max(1, min(num_tiles, triton.cdiv(4 * num_processors(grad.device), programs)))
    segment_tiles = triton.cdiv(num_tiles, segments)
    segments = triton.cdiv(num_tiles, segment_tiles)
    parts = torch.empty(batch_size, segments, taps + 1, hidden_size, dtype=dtype, device=grad.device)
    weight_gradient_kernel[programs, segments](
        window,
        grad,
        window if ids is None else ids.contiguous(),
        parts,
        length,
        hidden_size,
        segment_tiles,
        *window.stride()[:2],
        *grad.stride()[:2],
        TAPS=taps,
        HAS_IDS=ids is not None,
        BLOCK_T=BLOCK_T,
        BLOCK_D=block_d,
    )
    total = parts.sum((0, 1))
    return total[:-1].T.contiguous(), total[-1]
