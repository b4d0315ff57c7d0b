"""Backward passes over a batch of gradients: `torch.autograd.grad(..., is_grads_batched=True)`."""

import functools
from collections.abc import Callable

import torch


class _Context:
    """The context of a backward pass that is run several times: checkpointing lets its tensors be taken once."""

    def __init__(self, ctx):
        self.saved_tensors = ctx.saved_tensors
        self.needs_input_grad = ctx.needs_input_grad
        self.__dict__.update(vars(ctx))


def one_by_one(backward: Callable) -> Callable:
    """
    Decorate the `backward(ctx, *grads)` of a `torch.autograd.Function` whose operations have no batching rules in the
    `vmap` that autograd uses for a batch of gradients: run it for each of them.
    """

    @functools.wraps(backward)
    def run(ctx, *grads):
        batched = [i for i, grad in enumerate(grads) if torch._C._functorch.is_legacy_batchedtensor(grad)]
        if not batched:
            return backward(ctx, *grads)
        context = _Context(ctx)
        level = torch._C._vmapmode_increment_nesting() - 1
        torch._C._vmapmode_decrement_nesting()
        # The size would be that of a tensor without this dimension.
        rows = zip(*(torch._remove_batch_dim(grads[i], level, 1, 0) for i in batched), strict=True)
        results = []
        for row in rows:
            own = dict(zip(batched, row, strict=True))
            results.append(backward(context, *(own.get(i, grad) for i, grad in enumerate(grads))))
        return tuple(
            None if parts[0] is None else torch._add_batch_dim(torch.stack(parts), 0, level)
            for parts in zip(*results, strict=True)
        )

    return run
