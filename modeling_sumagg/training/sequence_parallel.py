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

In chunks, the processes compute a chunk together, each its part, and then the next chunk. The state after a chunk is joined of
all its parts, the same in every process. Memory then grows with the length of a chunk, and not of the sequence.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from ..decoder.cache import SlidingWindowLayer, append_columns
from ..decoder.recurrence import Call, RecurrentLayer, State
from ..ops.causal_convolution.causal_convolution import causal_convolution
from ..ops.documents import Documents
from ..ops.running_sum.running_sum import causal_sum
from ..ops.running_sum.running_sum_torch import join_segments
from ..ops.token_statistics.token_statistics import causal_token_statistics
from .chunks import ChunkReader, Losses, Progress, backward_of_reader
from .chunks import State as NamedState


def backward_in_parallel(
    model: nn.Module,
    input_ids: torch.Tensor,
    labels: torch.Tensor,
    *,
    chunk_length: int | None = None,
    attention_mask: torch.Tensor | None = None,
    position_ids: torch.Tensor | None = None,
    num_items_in_batch: torch.Tensor | int | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    loss_scale: torch.Tensor | float = 1.0,
    progress: Progress | None = None,
    group: dist.ProcessGroup | None = None,
) -> torch.Tensor:
    """
    Add the gradients of the loss of a sequence to those of the parameters, each process computing a part of the sequence.

    All processes call this with the same arguments and models of the same weights, and have the same gradients afterwards:
    those of `model(input_ids, labels=labels, ...).loss.backward()` in one process, up to rounding.

    Args:
        model (`nn.Module`): a causal model of this package for language modelling or the classification of tokens, as it is or
            with PEFT's adapters. It is not in `DistributedDataParallel` or FSDP: the gradients are summed here.
        chunk_length (`int`, *optional*): the tokens that all processes compute together, each an equal part of them, before
            the next ones; a multiple of the number of processes. By default the whole sequence.
        group (`ProcessGroup`, *optional*): the processes among which the sequence is cut; by default all of them.
        input_ids, labels, attention_mask, position_ids, num_items_in_batch, ignore_index, label_smoothing, loss_scale,
            progress: as for [`~modeling_sumagg.training.backward_in_chunks`].

    Returns:
        `torch.Tensor` of shape `[]`: the loss of the whole, without a graph and without `loss_scale`.

    Raises:
        `TypeError`, `ValueError`: as [`~modeling_sumagg.training.backward_in_chunks`]; a classifier of sequences; a
            `chunk_length` that is no multiple of the number of processes; or a label that a token in the part of another
            process predicts from behind padding.
    """
    reader = ParallelReader(model, input_ids, attention_mask, position_ids, chunk_length, group)
    losses = Losses(reader, labels, num_items_in_batch, ignore_index, label_smoothing)
    if losses.is_pooled:
        raise ValueError("A classifier of sequences reads them in one process: use `backward_in_chunks`.")
    reader.check_labels(losses)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    held = [parameter.grad for parameter in parameters]
    for parameter in parameters:
        parameter.grad = None
    loss = backward_of_reader(reader, losses, loss_scale, progress)
    for parameter, before in zip(parameters, held, strict=True):
        if parameter.grad is not None:
            dist.all_reduce(parameter.grad, group=group)
        if before is not None:
            parameter.grad = before if parameter.grad is None else before + parameter.grad
    dist.all_reduce(loss, group=group)
    return loss


class ParallelReader(ChunkReader):
    """A model and a sequence whose chunks are computed by all processes together."""

    def __init__(
        self,
        model: nn.Module,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None,
        position_ids: torch.Tensor | None,
        chunk_length: int | None,
        group: dist.ProcessGroup | None,
    ):
        self.group = group
        self.rank, self.num_parts = dist.get_rank(group), dist.get_world_size(group)
        if chunk_length is None:
            chunk_length = max(1, -(-input_ids.shape[-1] // self.num_parts)) * self.num_parts
        if chunk_length < 1 or chunk_length % self.num_parts:
            raise ValueError(
                f"`chunk_length` must be a multiple of the {self.num_parts} processes, which compute equal parts of a chunk, "
                f"got {chunk_length}."
            )
        super().__init__(model, input_ids, attention_mask, position_ids, chunk_length)
        config = self.head.config
        beside = config.attention_sinks or getattr(config, "attention_sum", False)
        if beside and "sliding_attention" in config.layer_types:
            raise ValueError(
                "Sequence parallelism hands neither the sinks nor the sums of sliding attention layers to the next process: "
                "train with `attention_sinks=0` and `attention_sum=False`, or without it."
            )
        self.parts = [self.part(chunk, self.rank) for chunk in self.chunks]

    def part(self, chunk: slice, rank: int) -> slice:
        """The tokens of a chunk that a process computes."""
        length = (chunk.stop - chunk.start) // self.num_parts
        return slice(chunk.start + rank * length, chunk.start + (rank + 1) * length)

    def padded_length(self, input_ids: torch.Tensor) -> int:
        """The length of which every process has an equal part."""
        return -(-input_ids.shape[1] // self.num_parts) * self.num_parts

    def check_labels(self, losses: Losses) -> None:
        """Refuse a label that the last real token of another process would predict."""
        if self.mask is None:
            return
        parts = [self.part(chunk, rank) for chunk in self.chunks for rank in range(self.num_parts)]
        for part in parts[1:]:
            is_padding = self.mask[:, part].cumsum(dim=1) == 0
            if (is_padding & (losses.labels[:, part] != losses.ignore_index)).any():
                raise ValueError(
                    f"Token {part.start} begins the part of a process with padding that has a label: set the labels of "
                    f"padding, and of the tokens after it, to {losses.ignore_index}, or pad on the right."
                )

    def gradients_of(self, leaves: NamedState) -> NamedState:
        """The sums of the gradients of the processes, and what this one adds to those of the chunk before."""
        gradients = {}
        for name, leaf in leaves.items():
            if leaf.requires_grad:
                gradient = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
                dist.all_reduce(gradient, group=self.group)
                # Every process goes back from the state that all of them have joined.
                gradients[name] = gradient / self.num_parts
        return gradients

    def empty_cache(self, index: int) -> DynamicCache:
        """The cache with which this process computes its part of a chunk."""
        chunk, config = self.chunks[index], self.head.config
        masks = None if self.mask is None else [self.mask[:, self.part(chunk, rank)] for rank in range(self.num_parts)]
        cache = DynamicCache(config=config)
        for i, layer_type in enumerate(config.layer_types):
            if layer_type == "full_attention":
                cache.layers[i] = _ParallelAttentionLayer(self.parts[index].start, self.group)
            elif layer_type == "sliding_attention":
                cache.layers[i] = _ParallelSlidingLayer(config.sliding_window, masks, self.group)
            else:
                cache.layers[i] = _ParallelRecurrentLayer(self.group)
        return cache

    @contextlib.contextmanager
    def handing_on(self, chunk: slice, before: NamedState, after: NamedState) -> Iterator[None]:
        """No token predicts from behind padding, see `check_labels`."""
        yield


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

    def __init__(self, group: dist.ProcessGroup | None):
        super().__init__()
        self.group = group

    def update(
        self,
        key_states: torch.Tensor,
        value_states: torch.Tensor | None = None,
        *,
        call: Call,
        restart: torch.Tensor | None = None,
    ) -> tuple[Any, None]:
        join = _join_windows if call.operator is causal_convolution else _join_sums
        before, self.states[call.name] = join(call, self.states.get(call.name), restart, self.group)
        # A document that begins with the part gets nothing of what is before it.
        return call.run(self._restarted(before, restart))[0], None


def _join_sums(
    call: Call, initial: State | None, restart: torch.Tensor | None, group: dist.ProcessGroup | None
) -> tuple[State, State]:
    """
    The sums before the part of this process and after all parts, from those before the first part: each is the one before
    times the decay of a part, and what the part adds.
    """
    log_decay = _log_decay_of_part(call, restart)
    own = call.run(None)[1]
    initial = tuple(torch.zeros_like(state) for state in own) if initial is None else initial
    if call.operator is not causal_token_statistics:
        return _joined(initial, own, log_decay, group)
    # The memberships of a part depend on the second moments before it.
    before, after = _joined(initial[:1], own[:1], log_decay, group)
    kept = before[0] if restart is None else before[0].masked_fill(restart[:, None, None], 0)
    own = call.run((kept, torch.zeros_like(own[1]), torch.zeros_like(own[2])))[1]
    weighed_before, weighed_after = _joined(initial[1:], own[1:], log_decay, group)
    return (*before, *weighed_before), (*after, *weighed_after)


def _log_decay_of_part(call: Call, restart: torch.Tensor | None) -> torch.Tensor:
    """The logarithm of what a part leaves of the state before it, `[B, K]`; `-inf` where a document begins in the part."""
    log_decay, x = call.arguments.get("log_decay"), call.inputs[0]
    terms = x.new_zeros(x.shape[0], call.length, 1 if log_decay is None else log_decay.shape[-1])
    delimiters = {name: call.arguments[name] for name in ("attention_mask", "document_ids")}
    total = causal_sum(terms, log_decay=log_decay, return_log_decay=True, **delimiters)[2]
    return total if restart is None else total.masked_fill(restart[:, None], -torch.inf)


def _joined(
    initial: State, states: State, log_decay: torch.Tensor, group: dist.ProcessGroup | None
) -> tuple[State, State]:
    """
    The states before the part of this process and after all parts, from those before the first part and from those that each
    process has computed from zero.
    """
    batch_size, heads = log_decay.shape
    flat = [state.reshape(batch_size, heads, -1) for state in states]
    gathered = _Gather.apply(torch.cat([log_decay[..., None].to(flat[0].dtype), *flat], dim=2), group)
    # With the sum of nothing too, so that every process takes part in the backward pass of the gathering.
    total = torch.cat([state.reshape(batch_size, heads, -1) for state in initial], dim=2) + gathered[:0, ..., 1:].sum(
        0
    )
    totals = join_segments(gathered[..., 1:], gathered[..., 0], total)
    sizes = [state.shape[2] for state in flat]

    def shaped(total: torch.Tensor) -> State:
        parts = total.split(sizes, dim=2)
        return tuple(part.reshape(state.shape) for part, state in zip(parts, states, strict=True))

    return shaped(totals[dist.get_rank(group)]), shaped(totals[-1])


def _join_windows(
    call: Call, initial: State | None, restart: torch.Tensor | None, group: dist.ProcessGroup | None
) -> tuple[State, State]:
    """The last inputs of a convolution before the part of this process and after all parts, `[B, k - 1, D]`."""
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
    windows = [gathered[:0].sum(dim=0) if initial is None else initial[0] + gathered[:0].sum(dim=0)]
    steps = torch.arange(past, device=own.device)[None]
    for part_counts, part in zip(counts, gathered, strict=True):
        # The part has `count` inputs of its own, at the end.
        first_own = past - part_counts[:, None]
        index = torch.where(steps < first_own, steps + part_counts[:, None], steps + past)
        columns = torch.cat([windows[-1], part], dim=1)
        windows.append(columns.gather(1, index[..., None].expand(-1, -1, columns.shape[2])))
    return (windows[dist.get_rank(group)],), (windows[-1],)


class _ParallelSlidingLayer(SlidingWindowLayer):
    """The keys and values of the last real tokens before the part of this process; `masks` are those of all parts."""

    def __init__(self, sliding_window: int, masks: list[torch.Tensor] | None, group: dist.ProcessGroup | None):
        super().__init__(sliding_window)
        self.group, self.rank, self.masks = group, dist.get_rank(group), masks

    @property
    def num_columns(self) -> int:
        return min(self.cumulative_length, self.sliding_window - 1)

    def _append(
        self, key: torch.Tensor, value: torch.Tensor, before: State | None, mask: torch.Tensor | None
    ) -> tuple:
        """The columns `before` with a segment behind them, and those that are kept after it."""
        return append_columns(
            key,
            value,
            initial_state=before,
            attention_mask=mask,
            document_ids=None,
            num_columns=self.sliding_window - 1,
        )

    def _append_mask(self, mask: torch.Tensor, before: State | None) -> State:
        """The kept columns after a part with a mask, as columns of one number with which of them are real."""
        columns = torch.zeros(mask.shape[0], 1, mask.shape[1], 1, device=mask.device)
        return self._append(columns, columns, before, mask)[1]

    def past_real(self, inputs: torch.Tensor) -> torch.Tensor | None:
        if self.masks is None or self.num_columns == 0:
            return None
        real: State | None = None
        if self.columns:
            real = (self.keys[:, :1, :, :1], self.values[:, :1, :, :1], *self.columns[2:])
        for mask in self.masks[: self.rank]:
            real = self._append_mask(mask, real)
        return real[2] if real is not None and len(real) > 2 else None

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, **tokens: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As in [`~SlidingWindowLayer.update`]; the mask and the positions of the segment are those of the whole."""
        masks = self.masks or [None] * dist.get_world_size(self.group)
        own = self._append(key_states, value_states, None, masks[self.rank])[1]
        width = key_states.shape[3]
        gathered = _Gather.apply(torch.cat(own[:2], dim=3), self.group)
        # With none of the gathered columns too, so that every process takes part in the backward pass of the gathering.
        state: State = (gathered[0, :, :, :0, :width], gathered[0, :, :, :0, width:])
        if self.columns:
            pairs = zip(self.columns, state, strict=False)
            state = (*[torch.cat(pair, dim=2) for pair in pairs], *self.columns[2:])
        before = state
        for rank, mask in enumerate(masks):
            if rank == self.rank:
                before = state
            # Which of the columns that the part has kept are real.
            real = None if mask is None else self._append_mask(mask, None)[2]
            state = self._append(gathered[rank, ..., :width], gathered[rank, ..., width:], state, real)[1]
        outputs = self._append(key_states, value_states, before, masks[self.rank])[0]
        self.states[append_columns.__name__] = state
        return outputs


class _ParallelAttentionLayer(DynamicLayer):
    """The keys and values of all `num_before` tokens before the part of this process."""

    def __init__(self, num_before: int, group: dist.ProcessGroup | None):
        super().__init__()
        self.group, self.num_before = group, num_before
        self.keys: torch.Tensor | None = None
        self.values: torch.Tensor | None = None

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        def up_to_here(before: torch.Tensor | None, tensor: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            parts = _Gather.apply(tensor, self.group)
            before = tensor[:, :, :0] if before is None else before
            earlier = parts[: dist.get_rank(self.group)].transpose(0, 1).transpose(1, 2).flatten(2, 3)
            everything = torch.cat([before, *parts], dim=2)
            return torch.cat([before, earlier, tensor], dim=2), everything

        (keys, values), (self.keys, self.values) = zip(
            up_to_here(self.keys, key_states), up_to_here(self.values, value_states), strict=True
        )
        return keys, values

    def get_seq_length(self) -> int:
        return self.num_before


__all__ = ["backward_in_parallel"]
