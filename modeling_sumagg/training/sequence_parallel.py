"""
One sequence cut over several processes, with the gradients of the whole.

Each process computes contiguous tokens. A layer needs from the processes before its own the state that they leave behind. All
processes compute their states from zero at the same time, gather them, and join those before their own:

- A sum, a mean or a keyed sum is its state from zero and the decay of the part, `S_before = a_j S_before + S_j` over the
  processes j before.
- Token statistics need the second moments before the memberships: they are gathered first, and then the sums that they weigh.
- A convolution and a sliding window need the last tokens.
- Full attention needs the keys and values of all tokens before.

Autograd takes the gradients back the same way.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from transformers import DynamicCache, PreTrainedConfig
from transformers.cache_utils import DynamicLayer

from ..decoder.cache import SlidingWindowLayer, append_columns
from ..decoder.recurrence import Call, RecurrentLayer, State
from ..ops.causal_convolution.causal_convolution import causal_convolution
from ..ops.documents import Documents
from ..ops.running_sum.running_sum import causal_sum
from ..ops.token_statistics.token_statistics import causal_token_statistics
from .chunks import ChunkReader, Losses


def backward_in_parallel(
    model: nn.Module,
    input_ids: torch.Tensor,
    labels: torch.Tensor,
    *,
    attention_mask: torch.Tensor | None = None,
    position_ids: torch.Tensor | None = None,
    num_items_in_batch: torch.Tensor | int | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    loss_scale: torch.Tensor | float = 1.0,
    group: dist.ProcessGroup | None = None,
) -> torch.Tensor:
    """
    Add the gradients of the loss of a sequence to those of the parameters, each process computing a part of the sequence.

    All processes call this with the same arguments and models of the same weights, and have the same gradients afterwards:
    those of `model(input_ids, labels=labels, ...).loss.backward()` in one process, up to rounding.

    Args:
        model (`nn.Module`): a causal model of this package for language modelling or the classification of tokens, as it is or
            with PEFT's adapters. It is not in `DistributedDataParallel` or FSDP: the gradients are summed here.
        group (`ProcessGroup`, *optional*): the processes among which the sequence is cut; by default all of them.
        input_ids, labels, attention_mask, position_ids, num_items_in_batch, ignore_index, label_smoothing, loss_scale: as for
            [`~modeling_sumagg.training.backward_in_chunks`].

    Returns:
        `torch.Tensor` of shape `[]`: the loss of the whole, without a graph and without `loss_scale`.

    Raises:
        `TypeError`, `ValueError`: as [`~modeling_sumagg.training.backward_in_chunks`]; a classifier of sequences, or a label
            that a token in the part of another process predicts from behind padding.
    """
    rank, num_parts = dist.get_rank(group), dist.get_world_size(group)
    length = -(-input_ids.shape[1] // num_parts)
    reader = ChunkReader(model, input_ids, attention_mask, position_ids, length, num_chunks=num_parts)
    losses = Losses(reader, labels, num_items_in_batch, ignore_index, label_smoothing)
    if losses.is_pooled:
        raise ValueError("A classifier of sequences reads them in one process: use `backward_in_chunks`.")
    if reader.mask is not None:
        for part in reader.chunks[1:]:
            is_padding = reader.mask[:, part].cumsum(dim=1) == 0
            if (is_padding & (losses.labels[:, part] != ignore_index)).any():
                raise ValueError(
                    f"Token {part.start} begins the part of a process with padding that has a label: set the labels of "
                    f"padding, and of the tokens after it, to {ignore_index}, or pad on the right."
                )
    cache = parallel_cache(reader.head.config, reader.mask, length, group)
    outputs = reader.forward(rank, cache, **losses.arguments(rank))
    part_of_loss = losses.of_chunk(rank, outputs)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    gradients = torch.autograd.grad(part_of_loss * loss_scale, parameters, allow_unused=True)  # type: ignore[operator]
    for parameter, gradient in zip(parameters, gradients, strict=True):
        if gradient is not None:
            dist.all_reduce(gradient, group=group)
            parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient
    loss = part_of_loss.detach()
    dist.all_reduce(loss, group=group)
    return loss


def parallel_cache(
    config: PreTrainedConfig, mask: torch.Tensor | None, length: int, group: dist.ProcessGroup | None
) -> DynamicCache:
    """
    The cache with which the forward pass of this process computes its part of a sequence.

    Args:
        config (`PreTrainedConfig`): that of the decoder.
        mask (`torch.Tensor` of shape `[B, T]`, bool, *optional*): the real tokens of the whole sequence.
        length (`int`): the tokens of a part, the same in all processes.
        group (`ProcessGroup`, *optional*): the processes.
    """
    beside = config.attention_sinks or getattr(config, "attention_sum", False)
    if beside and "sliding_attention" in config.layer_types:
        raise ValueError(
            "Sequence parallelism hands neither the sinks nor the sums of sliding attention layers to the next process: "
            "train with `attention_sinks=0` and `attention_sum=False`, or without it."
        )
    cache = DynamicCache(config=config)
    before = None if mask is None else mask[:, : dist.get_rank(group) * length]
    for index, layer_type in enumerate(config.layer_types):
        if layer_type == "full_attention":
            cache.layers[index] = _ParallelAttentionLayer(length, group)
        elif layer_type == "sliding_attention":
            cache.layers[index] = _ParallelSlidingLayer(config.sliding_window, mask, length, group)
        else:
            cache.layers[index] = _ParallelRecurrentLayer(length, group)
        if layer_type != "full_attention":
            cache.layers[index].real_tokens = before
    return cache


class _Gather(torch.autograd.Function):
    """The tensors of all processes, `[R, ...]`. Backward gives each process the sum of the gradients of its own."""

    @staticmethod
    def forward(ctx, tensor, group):
        ctx.group = group
        gathered = [torch.empty_like(tensor) for _ in range(dist.get_world_size(group))]
        dist.all_gather(gathered, tensor.contiguous(), group=group)
        return torch.stack(gathered)

    @staticmethod
    def backward(ctx, gradient):
        gradient = gradient.contiguous()
        dist.all_reduce(gradient, group=ctx.group)
        return gradient[dist.get_rank(ctx.group)], None


class _ParallelRecurrentLayer(RecurrentLayer):
    """The states of a layer before the part of this process, made of what all processes compute from zero."""

    def __init__(self, length: int, group: dist.ProcessGroup | None):
        super().__init__()
        self.group, self.rank = group, dist.get_rank(group)
        self.cumulative_length = self.rank * length

    def update(
        self,
        key_states: torch.Tensor,
        value_states: torch.Tensor | None = None,
        *,
        call: Call,
        restart: torch.Tensor | None = None,
    ) -> tuple[Any, None]:
        before = _window_before if call.operator is causal_convolution else _sums_before
        # A document that begins with the part gets nothing of what is before it.
        return call.run(self._restarted(before(call, restart, self.group), restart))[0], None


def _sums_before(call: Call, restart: torch.Tensor | None, group: dist.ProcessGroup | None) -> State:
    """The sums before a part: each is the one before times the decay of a part, and what the part adds."""
    log_decay = _log_decay_of_part(call, restart)
    own = call.run(None)[1]
    if call.operator is not causal_token_statistics:
        return _joined(own, log_decay, group)
    # The memberships of a part depend on the second moments before it.
    (second_moment,) = _joined(own[:1], log_decay, group)
    zeros = (torch.zeros_like(own[1]), torch.zeros_like(own[2]))
    kept = second_moment if restart is None else second_moment.masked_fill(restart[:, None, None], 0)
    return (second_moment, *_joined(call.run((kept, *zeros))[1][1:], log_decay, group))


def _log_decay_of_part(call: Call, restart: torch.Tensor | None) -> torch.Tensor:
    """The logarithm of what a part leaves of the state before it, `[B, K]`; `-inf` where a document begins in the part."""
    log_decay, x = call.arguments.get("log_decay"), call.inputs[0]
    terms = x.new_zeros(x.shape[0], call.length, 1 if log_decay is None else log_decay.shape[-1])
    delimiters = {name: call.arguments[name] for name in ("attention_mask", "document_ids")}
    total = causal_sum(terms, log_decay=log_decay, return_log_decay=True, **delimiters)[2]
    return total if restart is None else total.masked_fill(restart[:, None], -torch.inf)


def _joined(states: State, log_decay: torch.Tensor, group: dist.ProcessGroup | None) -> State:
    """The states before the part of this process, from those that each process has computed from zero."""
    batch_size, heads = log_decay.shape
    flat = [state.reshape(batch_size, heads, -1) for state in states]
    gathered = _Gather.apply(torch.cat([log_decay[..., None].to(flat[0].dtype), *flat], dim=2), group)
    # Of no process a sum all the same, so that every process takes part in the backward pass of the gathering.
    total = gathered[:0, ..., 1:].sum(dim=0)
    for part in gathered[: dist.get_rank(group)]:
        total = part[..., :1].exp() * total + part[..., 1:]
    sizes = [state.shape[2] for state in flat]
    return tuple(part.reshape(state.shape) for part, state in zip(total.split(sizes, dim=2), states, strict=True))


def _window_before(call: Call, restart: torch.Tensor | None, group: dist.ProcessGroup | None) -> State:
    """The last inputs of a convolution before a part, `[B, k - 1, D]`."""
    own = call.run(None)[1][0]
    batch_size, past = own.shape[:2]
    mask, documents = call.arguments["attention_mask"], call.arguments["document_ids"]
    document_ids = documents.ids if isinstance(documents, Documents) else documents
    count = own.new_full((batch_size,), call.length) if mask is None else mask.sum(dim=1).to(own.dtype)
    # Of a document that begins in the part, what is before it is zero.
    begins = (
        torch.zeros_like(count, dtype=torch.bool) if document_ids is None else document_ids[:, -1] > document_ids[:, 0]
    )
    count = count.masked_fill(begins if restart is None else begins | restart, past).clamp(max=past)
    gathered = _Gather.apply(torch.cat([count[:, None], own.flatten(1)], dim=1), group)
    counts, gathered = gathered[..., 0].long(), gathered[..., 1:].unflatten(2, own.shape[1:])
    window = gathered[:0].sum(dim=0)
    steps = torch.arange(past, device=own.device)[None]
    for rank in range(dist.get_rank(group)):
        # The part has `count` inputs of its own, at the end.
        first_own = past - counts[rank][:, None]
        index = torch.where(steps < first_own, steps + counts[rank][:, None], steps + past)
        columns = torch.cat([window, gathered[rank]], dim=1)
        window = columns.gather(1, index[..., None].expand(-1, -1, columns.shape[2]))
    return (window,)


class _ParallelSlidingLayer(SlidingWindowLayer):
    """The keys and values of the last real tokens before the part of this process."""

    def __init__(self, sliding_window: int, mask: torch.Tensor | None, length: int, group: dist.ProcessGroup | None):
        super().__init__(sliding_window)
        self.group, self.rank, self.mask, self.part_length = group, dist.get_rank(group), mask, length
        self.cumulative_length = self.rank * length

    @property
    def num_columns(self) -> int:
        return min(self.cumulative_length, self.sliding_window - 1)

    def _mask_of(self, rank: int) -> torch.Tensor | None:
        return None if self.mask is None else self.mask[:, rank * self.part_length : (rank + 1) * self.part_length]

    def _after(self, key: torch.Tensor, value: torch.Tensor, before: State | None, mask: torch.Tensor | None) -> State:
        columns = self.sliding_window - 1
        _, state = append_columns(
            key, value, initial_state=before, attention_mask=mask, document_ids=None, num_columns=columns
        )
        return state

    def past_real(self, inputs: torch.Tensor) -> torch.Tensor | None:
        if self.mask is None or self.num_columns == 0:
            return None
        real: State | None = None
        for rank in range(self.rank):
            mask = self._mask_of(rank)
            columns = torch.zeros(*mask.shape, 1, device=mask.device)[:, None]
            real = self._after(columns, columns, real, mask)
        return None if real is None else real[2]

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, **tokens: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As in [`~SlidingWindowLayer.update`]; the mask and the positions of the segment are those of the whole."""
        own_mask = self._mask_of(self.rank)
        own = self._after(key_states, value_states, None, own_mask)
        width = key_states.shape[3]
        gathered = _Gather.apply(torch.cat(own[:2], dim=3), self.group)
        state: State = (gathered[0, :, :, :0, :width], gathered[0, :, :, :0, width:])
        for rank in range(self.rank):
            mask = self._mask_of(rank)
            real = None
            if mask is not None:
                # Which of the columns that the part has kept are real.
                columns = torch.zeros(*mask.shape, 1, device=mask.device)[:, None]
                real = self._after(columns, columns, None, mask)[2]
            state = self._after(gathered[rank, ..., :width], gathered[rank, ..., width:], state, real)
        columns = self.sliding_window - 1
        outputs, _ = append_columns(
            key_states,
            value_states,
            initial_state=state,
            attention_mask=own_mask,
            document_ids=None,
            num_columns=columns,
        )
        return outputs


class _ParallelAttentionLayer(DynamicLayer):
    """The keys and values of all tokens before the part of this process."""

    def __init__(self, length: int, group: dist.ProcessGroup | None):
        super().__init__()
        self.group, self.rank = group, dist.get_rank(group)
        self.num_before = self.rank * length

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        def up_to_here(tensor: torch.Tensor) -> torch.Tensor:
            gathered = _Gather.apply(tensor, self.group)
            before = gathered[: self.rank].transpose(0, 1).transpose(1, 2).flatten(2, 3)
            return torch.cat([before, tensor], dim=2)

        return up_to_here(key_states), up_to_here(value_states)

    def get_seq_length(self) -> int:
        return self.num_before


__all__ = ["backward_in_parallel", "parallel_cache"]
