"""What the Triton kernels share. Kernels take contiguous tensors."""

import functools

import torch


try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError(f"The kernels need Triton, which cannot be imported ({error}). Install `triton`.") from error


FLOAT64_BLOCK_T = 16  # tokens of a tile of float64; at least 16, as a factor of a matrix product
MIN_BLOCK = 16  # channels of a tile, as a factor of a matrix product
HUGE = tl.constexpr(2.0**127)  # stands for what is not finite in a product with zeros and ones


@triton.jit
def _nothing():
    pass


INTERPRETED = tl.constexpr(not isinstance(_nothing, triton.JITFunction))


@triton.jit
def convert(x, dtype: tl.constexpr):
    # The interpreter converts bfloat16 from and to float32 alone.
    if x.dtype == tl.bfloat16 or dtype == tl.bfloat16:
        x = x.to(tl.float32)
    return x.to(dtype)


@triton.jit
def constant(value: tl.constexpr, dtype: tl.constexpr):
    # In an expression a number would be rounded to float32 first.
    return tl.full([], value, dtype)


@triton.jit
def multiply(terms, x):
    """`terms` `[C, C]`, bool, times `x` `[C, n]`, added up in float32."""
    # The interpreter would multiply bfloat16 by their bit patterns.
    if INTERPRETED and x.dtype == tl.bfloat16:
        x = x.to(tl.float32)
    return tl.dot(terms.to(x.dtype), x)


@triton.jit
def find_non_finite(x):
    """Where `x` is NaN or infinite."""
    x = convert(x, tl.float32)
    return x - x != 0.0


@triton.jit
def sum_rows(terms, x, carry):
    """
    `terms` `[C, C]`, bool, says which rows of `x` `[C, n]` each row of the result adds, in the dtype of `carry` `[C, n]`,
    which is added last. A row is NaN if it adds what is not finite.

    A matrix product, exact but for the rounding of the sums: of 16-bit numbers with zeros and ones, and of float32 as
    three bfloat16, which hold its 24 bits. A scan would pass every partial sum from thread to thread. Float64, for which
    Triton's products do not compile reliably, is added up plainly; its tiles are short.

    Zero times NaN is NaN, so what is not finite is replaced before the product, and told by the sums.
    """
    nan = float("nan")
    if x.dtype == tl.float64:
        sums = tl.sum(tl.where(terms[:, :, None], x[None, :, :], 0.0), 1)
    elif x.dtype == tl.float16:
        bad = find_non_finite(x)
        reached = multiply(terms, tl.where(bad, 1.0, 0.0).to(tl.float16))
        sums = tl.where(reached > 0.0, nan, multiply(terms, tl.where(bad, 0.0, x)))
    else:
        rest = tl.where(find_non_finite(x), HUGE, convert(x, tl.float32))
        high = rest.to(tl.bfloat16)
        sums = multiply(terms, high)
        if x.dtype == tl.float32:
            rest -= high.to(tl.float32)
            middle = rest.to(tl.bfloat16)
            rest -= middle.to(tl.float32)
            sums = multiply(terms, rest.to(tl.bfloat16)) + multiply(terms, middle) + sums
        sums = tl.where(sums >= HUGE, nan, sums)
    # As a plain sum the compiler would make the carry a term of the product, whose long sums stop growing.
    return tl.fma(sums, 1.0, carry)


@triton.jit
def sum_decayed(decays, seen, x):
    """
    `decays` `[C, C]` times `x` `[C, n]` in their dtype, of the rows that are `seen` `[C, C]`. A row is NaN if it adds what is
    not finite, however small the decay. Float64, whose products Triton compiles unreliably, is added up plainly.
    """
    if decays.dtype == tl.float64:
        return tl.sum(tl.where(seen[:, :, None], decays[:, :, None] * x[None, :, :], 0.0), 1)
    bad = find_non_finite(x)
    reached = multiply(seen, tl.where(bad, 1.0, 0.0).to(tl.bfloat16))
    sums = tl.dot(decays, tl.where(bad, 0.0, x), input_precision="ieee")
    return tl.where(reached > 0.0, float("nan"), sums)


def on_its_device(function):
    """Triton launches on the current device, which need not be that of the first argument."""

    @functools.wraps(function)
    def wrapped(x, *args, **kwargs):
        with torch.cuda.device_of(x):
            return function(x, *args, **kwargs)

    return wrapped


def contiguous(*tensors: torch.Tensor | None) -> list[torch.Tensor | None]:
    return [tensor if tensor is None else tensor.contiguous() for tensor in tensors]


def given(*tensors: torch.Tensor | None, instead: torch.Tensor) -> list[torch.Tensor]:
    """The tensors, and for `None` another one: an argument that its constant switches off is never read."""
    return [instead if tensor is None else tensor for tensor in tensors]


def num_processors(device: torch.device) -> int:
    """The multiprocessors of a GPU; 1 in the interpreter, which runs one program after the other."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
