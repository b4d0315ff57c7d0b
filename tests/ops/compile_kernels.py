"""Compiles every kernel for an H100, which needs no GPU; run as a script, since nothing is launched in its process."""

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from modeling_sumagg.ops import (
    causal_convolution,
    causal_mean,
    causal_sum,
    causal_token_statistics,
    kernel_modes,
    set_kernels,
    token_statistics,
)
from modeling_sumagg.ops.running_sum import running_sum_kernels


TYPES = {
    torch.float32: "*fp32",
    torch.float64: "*fp64",
    torch.bfloat16: "*bf16",
    torch.bool: "*i1",
    torch.int64: "*i64",
}
SHARED_MEMORY = 227 * 1024  # of a block, in bytes

compiled = {}


def compile_only(kernel, *args, grid, warmup, num_warps=4, **kwargs):
    """In place of a launch."""
    values = {**dict(zip(kernel.arg_names, args, strict=False)), **kwargs}
    signature, constants, attributes = {}, {}, {}
    for parameter in kernel.params:
        value = values[parameter.name]
        if parameter.is_constexpr:
            signature[parameter.name] = "constexpr"
            constants[parameter.name] = value
        elif isinstance(value, torch.Tensor):
            signature[parameter.name] = TYPES[value.dtype]
        else:
            signature[parameter.name] = "i32"
        if parameter.name.endswith("_ptr") or (not parameter.is_constexpr and value % 16 == 0):
            attributes[(parameter.num,)] = [["tt.divisibility", 16]]
    key = (kernel.__name__, *signature.values(), *constants.values(), *attributes)
    if key not in compiled:
        source = ASTSource(kernel, signature, constants, attributes)
        compiled[key] = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": num_warps})
        assert compiled[key].metadata.shared <= SHARED_MEMORY, (key, compiled[key].metadata.shared)


def main():
    JITFunction.run = compile_only
    kernel_modes.register_kernels()
    kernel_modes._has_kernels = lambda mode, device_type: True
    set_kernels("triton")
    # In segments.
    running_sum_kernels.num_processors = lambda device: 132
    running_sum_kernels.DECAY_SEGMENT_TILES = 1
    packing = {"attention_mask": torch.ones(2, 128).bool(), "document_ids": torch.zeros(2, 128).long()}
    for dtype, arguments in (
        (torch.bfloat16, {}),
        (torch.bfloat16, packing),
        (torch.float32, packing),
        (torch.float64, packing),
    ):
        x = torch.zeros(2, 128, 64, dtype=dtype, requires_grad=True)
        causal_sum(x, **arguments, relu=bool(arguments), scale=torch.ones(1, 128))[0].sum().backward()
        causal_sum(x, log_decay=torch.zeros(4), **arguments, relu=bool(arguments))[0].sum().backward()
        convolved, _ = causal_convolution(x, weight=torch.zeros(64, 4), bias=torch.zeros(64), **arguments)
        convolved.sum().backward()
        causal_mean(x, log_decay=torch.zeros(4), **arguments, relu=bool(arguments))[0].sum().backward()
        w = torch.zeros(2, 4, 128, 64, dtype=dtype, requires_grad=True)
        causal_token_statistics(w, torch.ones(4), torch.zeros(4, 128), **arguments)[0].sum().backward()
        token_statistics(w, torch.ones(4), dropout_p=0.1).sum().backward()
        with torch.no_grad():
            _, state = causal_token_statistics(w[:, :, :1], torch.ones(4), None)
            causal_token_statistics(w[:, :, :1], torch.ones(4), None, initial_state=state)
    names = {key[0] for key in compiled}
    assert len(names) == 15, names


if __name__ == "__main__":
    main()
