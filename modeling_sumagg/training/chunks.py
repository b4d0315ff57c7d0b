"""Gradients and losses of sequences of any length, chunk by chunk, equal to those of the whole sequence."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import get_device_states, set_device_states
from transformers import DynamicCache

from ..common.checks import check_ids, check_labels
from ..decoder.cache import adopt_cache
from ..decoder.heads import ForCausalLM, ForSequenceClassification, ForTokenClassification
from ..decoder.model import DecoderModel
from ..decoder.recurrence import RecurrentLayer


# By name: the tensors of a cache, and the hidden state of the last real token.
State = dict[str, torch.Tensor]
Progress = Callable[[int, int], None]


def backward_in_chunks(
    model: nn.Module,
    input_ids: torch.Tensor,
    labels: torch.Tensor,
    *,
    chunk_length: int,
    attention_mask: torch.Tensor | None = None,
    position_ids: torch.Tensor | None = None,
    num_items_in_batch: torch.Tensor | int | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    loss_scale: torch.Tensor | float = 1.0,
    progress: Progress | None = None,
) -> torch.Tensor:
    """
    Add the gradients of the loss of a whole sequence to those of the parameters, in the memory of one chunk.

    The chunks are read twice. The first reading goes forward without gradients and keeps the decode state at the
    beginning of each chunk. The second one goes from the last chunk to the first: it reads a chunk from its state, and
    takes the gradient of the state after the chunk back to the state before it. Nothing is truncated: the gradients are
    those of `model(input_ids, labels=labels, ...).loss.backward()`, up to rounding.

    The memory is that of one chunk and, for each chunk, of a state whose size does not depend on the length. A layer of
    full attention is an exception: its state is the keys and values of all tokens before, which grows with the length, and
    so does the time for a token.

    Args:
        model (`nn.Module`): a causal model of this package for language modelling, or for the classification of sequences
            or tokens, as it is or in `DistributedDataParallel`, FSDP2 or PEFT's adapters. The gradients of
            `DistributedDataParallel` are averaged once, with those of the first chunk. With FSDP2 the batches of all
            processes are padded to the longest one.
        input_ids (`torch.Tensor` of shape `[B, T]`, integer): the tokens.
        labels (`torch.Tensor`): what `model` takes as `labels`, for the whole sequence.
        chunk_length (`int`): the tokens of a chunk, at least 1; the last one may be shorter.
        attention_mask (`torch.Tensor` of shape `[B, T]`, *optional*): 1 for real tokens, 0 for padding anywhere.
        position_ids (`torch.Tensor` of shape `[1, T]` or `[B, T]`, *optional*): positions that restart with each document.
        num_items_in_batch (`torch.Tensor` or `int`, *optional*): what the sum of the losses of tokens is divided by; by
            default the number of labels that are not ignored. Not for the classification of sequences.
        ignore_index (`int`, defaults to -100): the label of a token without loss.
        label_smoothing (`float`, defaults to 0.0): the smoothing factor of transformers' `LabelSmoother`.
        loss_scale (`torch.Tensor` or `float`, defaults to 1.0): the gradients are those of the loss times this factor,
            such as the scale of a `GradScaler`.
        progress (`Callable`, *optional*): called after each reading of a chunk with the number of readings made and the
            number of all readings.

    Returns:
        `torch.Tensor` of shape `[]`: the loss, without a graph and without `loss_scale`.

    Raises:
        `TypeError`: a model of another kind.
        `ValueError`: a bidirectional model; gradient checkpointing or prompt tuning; a wrong shape; an argument out of
            range; a label that only padding comes before.
    """
    reader = ChunkReader(model, input_ids, attention_mask, position_ids, chunk_length)
    losses = Losses(reader, labels, num_items_in_batch, ignore_index, label_smoothing)
    return backward_of_reader(reader, losses, loss_scale, progress)


def backward_of_reader(
    reader: "ChunkReader", losses: "Losses", loss_scale: torch.Tensor | float, progress: Progress | None
) -> torch.Tensor:
    """The two readings of [`backward_in_chunks`], which returns the loss."""
    model, num_chunks = reader.model, len(reader.chunks)
    devices = list({parameter.device: parameter for parameter in model.parameters()}.values())

    states, random_states = KeptTensors(num_chunks - 1), KeptTensors(num_chunks - 1)
    growing: State = {}
    state: State = {}
    with torch.no_grad():
        for index in range(num_chunks - 1):
            random_states.keep(index, _random_state(devices))
            _, state = reader.read(index, state, **reader.few_logits)
            growing = {name: tensor for name, tensor in state.items() if _grows(name)}
            states.keep(index, {name: tensor for name, tensor in state.items() if not _grows(name)})
            _report(progress, index + 1, 2 * num_chunks - 1)

    loss = None
    gradients: State = {}
    for index in reversed(range(num_chunks)):
        is_last = index == num_chunks - 1
        if not is_last:
            # A copy: `torch.set_rng_state` reads the memory that its argument is a part of from the beginning.
            _set_random_state({name: tensor.clone() for name, tensor in random_states.of(index).items()})
        before = {**states.of(index - 1), **reader.columns_before(index, growing)} if index else {}
        leaves = {
            name: tensor.detach().requires_grad_() if tensor.is_floating_point() else tensor
            for name, tensor in before.items()
        }
        is_synchronized = index == 0 or not isinstance(model, DistributedDataParallel)
        with contextlib.nullcontext() if is_synchronized else model.no_sync():
            outputs, state = reader.read(index, leaves, **losses.arguments(index))
            if is_last:
                random_state_after = _random_state(devices)
            roots = [(state[name], gradient) for name, gradient in gradients.items() if state[name].requires_grad]
            part = losses.of_chunk(index, outputs)
            if part is None:
                # Every parameter takes part in every chunk, as `DistributedDataParallel` expects.
                roots.append((outputs.logits, torch.zeros_like(outputs.logits)))
            else:
                loss = part.detach() if loss is None else loss + part.detach()
                roots.append((part * loss_scale, None))
            with torch.autocast(reader.input_ids.device.type, enabled=False):
                torch.autograd.backward(*zip(*roots, strict=True))
        gradients = reader.gradients_of(leaves)
        # Nothing of this chunk is alive while the next one is read.
        del outputs, state, roots, part, before, leaves
        _report(progress, 2 * num_chunks - 1 - index, 2 * num_chunks - 1)
    _set_random_state(random_state_after)
    return loss


class KeptTensors:
    """
    Copies of the tensors of `num_chunks` chunks, those of one name in one tensor for as long as their shape stays the same
    (the state of a window grows until the window is full). A chunk may have names that earlier ones lack.

    A copy of its own for each chunk would stand between the activations of two chunks. The allocator of a CPU could then
    not use their memory again as one piece: about 1 MiB a chunk was lost, ten times the states.
    """

    def __init__(self, num_chunks: int):
        self.num_chunks = num_chunks
        # By name: the first chunk of each piece, and the tensors of that chunk and of the following ones.
        self.pieces: dict[str, list[tuple[int, torch.Tensor]]] = {}
        self.names: list[list[str]] = []

    def keep(self, index: int, tensors: State) -> None:
        """Copy the tensors of a chunk, which is the one after the last chunk that was kept."""
        self.names.append(list(tensors))
        for name, tensor in tensors.items():
            pieces = self.pieces.setdefault(name, [])
            if not pieces or pieces[-1][1].shape[1:] != tensor.shape:
                if pieces:
                    first, piece = pieces[-1]
                    pieces[-1] = first, piece[: index - first].clone()
                pieces.append((index, tensor.new_empty(self.num_chunks - index, *tensor.shape)))
            first, piece = pieces[-1]
            piece[index - first] = tensor

    def of(self, index: int) -> State:
        """The tensors of a chunk."""
        found = {}
        for name in self.names[index]:
            first, piece = next(piece for piece in reversed(self.pieces[name]) if piece[0] <= index)
            found[name] = piece[index - first]
        return found


class ChunkedEvaluation(NamedTuple):
    """
    What [`evaluate_in_chunks`] found, of which `None` are those that a kind of model does not have.

    Attributes:
        loss (`torch.Tensor` of shape `[]`): the loss of the whole sequence; `None` without labels.
        token_losses (`torch.Tensor` of shape `[B, T]`): of a language model, the negative log-likelihood of each label in
            nats; 0 for the first of a row, which nothing predicts, and for those that are ignored.
        logits (`torch.Tensor`): of a classifier, `[B, num_labels]` for sequences or `[B, T, num_labels]` for tokens.
    """

    loss: torch.Tensor | None
    token_losses: torch.Tensor | None
    logits: torch.Tensor | None


@torch.no_grad()
def evaluate_in_chunks(
    model: nn.Module,
    input_ids: torch.Tensor,
    labels: torch.Tensor | None = None,
    *,
    chunk_length: int,
    attention_mask: torch.Tensor | None = None,
    position_ids: torch.Tensor | None = None,
    num_items_in_batch: torch.Tensor | int | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    progress: Progress | None = None,
) -> ChunkedEvaluation:
    """
    The loss of a whole sequence in the memory of one chunk, and with it the loss of each token or the predictions.

    The perplexity of a document of any length is `evaluate_in_chunks(model.eval(), ids, ids, chunk_length=2048).loss.exp()`.

    The arguments and the errors are those of [`backward_in_chunks`]. A language model needs `labels`.
    """
    reader = ChunkReader(model, input_ids, attention_mask, position_ids, chunk_length)
    losses = None
    if labels is not None:
        losses = Losses(reader, labels, num_items_in_batch, ignore_index, label_smoothing)
    elif isinstance(reader.head, ForCausalLM):
        raise ValueError("A language model is evaluated by the loss of `labels`: pass them.")
    loss, rows = None, []
    state: State = {}
    for index in range(len(reader.chunks)):
        if isinstance(reader.head, ForCausalLM):
            outputs, state = reader.read(index, state)
            rows.append(losses.of_tokens(index, outputs.logits))
            part = losses.of_chunk(index, outputs) if label_smoothing else rows[-1].sum() / losses.num_items
        else:
            outputs, state = reader.read(index, state, **({} if losses is None else losses.arguments(index)))
            rows.append(outputs.logits)
            part = None if losses is None else losses.of_chunk(index, outputs)
        loss = part if loss is None or part is None else loss + part
        _report(progress, index + 1, len(reader.chunks))
    if isinstance(reader.head, ForSequenceClassification):
        return ChunkedEvaluation(loss, None, rows[-1])
    if isinstance(reader.head, ForTokenClassification):
        return ChunkedEvaluation(loss, None, torch.cat(rows, dim=1)[:, : input_ids.shape[1]])
    # Each was found where the token before it was read.
    token_losses = F.pad(torch.cat(rows, dim=1)[:, :-1], (1, 0))
    return ChunkedEvaluation(loss, token_losses[:, : input_ids.shape[1]], None)


class ChunkReader:
    """
    A model and a sequence, of which one chunk is read at a time.

    Attributes:
        head (`nn.Module`): the model inside of what wraps it.
        chunks (`list[slice]`): the tokens of each chunk.
        parts (`list[slice]`): those of them that this process computes.
        num_missing (`int`): how many masked tokens were added at the end.
        few_logits (`dict`): arguments for a reading of which nobody needs the logits.
    """

    def __init__(
        self,
        model: nn.Module,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None,
        position_ids: torch.Tensor | None,
        chunk_length: int,
    ):
        self.model = model
        self.head = checked_head(model)
        if input_ids.dim() != 2 or input_ids.shape[1] == 0:
            raise ValueError(f"`input_ids` must have the shape [B, T] with T >= 1, got {list(input_ids.shape)}.")
        check_ids("input_ids", input_ids, self.head.config.vocab_size, "the ids of the vocabulary")
        if chunk_length < 1:
            raise ValueError(f"`chunk_length` must be at least 1 token, got {chunk_length}.")
        if attention_mask is not None and attention_mask.shape != input_ids.shape:
            raise ValueError(
                f"`attention_mask` must have the shape [B, T] = {list(input_ids.shape)}, got {list(attention_mask.shape)}."
            )
        shapes = [[rows, input_ids.shape[1]] for rows in (1, input_ids.shape[0])]
        if position_ids is not None and list(position_ids.shape) not in shapes:
            raise ValueError(
                f"`position_ids` must have the shape [1, T] or [B, T] = {shapes[1]}, got {list(position_ids.shape)}."
            )
        mask = None if attention_mask is None else attention_mask.to(input_ids.device, torch.bool)
        length = self.padded_length(input_ids)
        num_missing = length - input_ids.shape[1]
        if num_missing:
            mask = torch.ones_like(input_ids, dtype=torch.bool) if mask is None else mask
            input_ids, mask = F.pad(input_ids, (0, num_missing)), F.pad(mask, (0, num_missing))
            position_ids = None if position_ids is None else F.pad(position_ids, (0, num_missing))
        self.num_missing = num_missing
        self.input_ids, self.position_ids = input_ids, position_ids
        self.mask = None if mask is None or mask.all() else mask
        self.chunks = [slice(start, min(start + chunk_length, length)) for start in range(0, length, chunk_length)]
        self.parts = self.chunks
        self.few_logits = {"logits_to_keep": 1} if isinstance(self.head, ForCausalLM) else {}

    def padded_length(self, input_ids: torch.Tensor) -> int:
        """The length of the longest batch of all processes, where they have to read the same number of chunks."""
        length = torch.tensor(input_ids.shape[1], device=input_ids.device)
        if any(isinstance(module, FSDPModule) for module in self.model.modules()):
            dist.all_reduce(length, op=dist.ReduceOp.MAX)
        return int(length)

    def gradients_of(self, leaves: State) -> State:
        """The gradients of the state before a chunk, which are handed on to the chunk before it."""
        return {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}

    def columns_before(self, index: int, growing: State) -> State:
        """Of the keys and values of full attention, those before a chunk."""
        return {name: tensor[:, :, : self.chunks[index].start] for name, tensor in growing.items()}

    def read(self, index: int, state: State, **arguments) -> tuple[Any, State]:
        """The outputs of the model for a chunk, and the state after it, from the state before it."""
        after: State = {}
        cache = self.cache(index, state)
        # What autocast has kept of a weight is without a graph, or with that of another chunk.
        torch.clear_autocast_cache()
        with self.handing_on(self.chunks[index], state, after):
            outputs = self.forward(index, cache, **arguments)
        return outputs, {**tensors_of(cache), **after}

    def cache(self, index: int, state: State) -> DynamicCache:
        """The cache before a chunk, of the tensors that it holds."""
        cache, start = self.empty_cache(index), self.parts[index].start
        for i, layer in enumerate(cache.layers):
            names = [name for name in state if name.startswith(f"{i}.")]
            if names:
                layer.lazy_initialization(*[state[name] for name in names[:2]])
            if isinstance(layer, RecurrentLayer):
                for name in names:
                    operator = name.split(".")[1]
                    layer.states[operator] = (*layer.states.get(operator, ()), state[name])
                if start:
                    layer.cumulative_length = start
                    layer.real_tokens = None if self.mask is None else self.mask[:, :start]
            elif names:
                layer.keys, layer.values = (state[name] for name in names)
        return cache

    def empty_cache(self, index: int) -> DynamicCache:
        """The cache of a model that has read nothing."""
        cache = DynamicCache(config=self.head.config)
        adopt_cache(cache, self.head.config)
        return cache

    def forward(self, index: int, cache: DynamicCache, **arguments) -> Any:
        """The outputs of the model for a chunk, with a cache that knows what is before it."""
        chunk = self.parts[index]
        return self.model(
            input_ids=self.input_ids[:, chunk],
            attention_mask=None if self.mask is None else self.mask[:, : chunk.stop],
            position_ids=None if self.position_ids is None else self.position_ids[:, chunk],
            past_key_values=cache,
            use_cache=True,
            **arguments,
        )

    @contextlib.contextmanager
    def handing_on(self, chunk: slice, before: State, after: State) -> Iterator[None]:
        """Let padding at the beginning of a chunk repeat the last real token, which is in a chunk before."""
        if self.mask is None:
            yield
            return
        real, seen = self.mask[:, chunk], self.mask[:, : chunk.start].any(dim=1)
        is_repeated = (real.long().cumsum(dim=1) == 0) & seen[:, None]

        def hand_on_last_token(module, args, output):
            hidden_states = output.last_hidden_state
            if "last_token" in before:
                hidden_states = torch.where(is_repeated[..., None], before["last_token"][:, None], hidden_states)
                output.last_hidden_state = hidden_states
            after["last_token"] = hidden_states[:, -1]

        decoder = next(module for module in self.head.modules() if isinstance(module, DecoderModel))
        hook = decoder.register_forward_hook(hand_on_last_token)
        try:
            yield
        finally:
            hook.remove()


def tensors_of(cache: DynamicCache) -> State:
    """The tensors of a cache, `{layer}.{operator}.{i}` of a recurrence, `{layer}.keys` and `{layer}.values` of full attention."""
    held: State = {}
    for i, layer in enumerate(cache.layers):
        if isinstance(layer, RecurrentLayer):
            for operator, state in layer.states.items():
                held |= {f"{i}.{operator}.{j}": tensor for j, tensor in enumerate(state)}
        else:
            held |= {f"{i}.keys": layer.keys, f"{i}.values": layer.values}
    return held


class Losses:
    """The parts of the loss that the chunks add to it."""

    def __init__(
        self,
        reader: ChunkReader,
        labels: torch.Tensor,
        num_items_in_batch: torch.Tensor | int | None,
        ignore_index: int,
        label_smoothing: float,
    ):
        self.head, self.parts = reader.head, reader.parts
        self.ignore_index, self.label_smoothing = ignore_index, label_smoothing
        self.num_items = num_items_in_batch
        if not 0 <= label_smoothing < 1:
            raise ValueError(f"`label_smoothing` must be in [0, 1), got {label_smoothing}.")
        self.is_pooled = isinstance(self.head, ForSequenceClassification)
        if not self.is_pooled:
            config = self.head.config
            num_classes = config.vocab_size if isinstance(self.head, ForCausalLM) else config.num_labels
            batch_size, length = reader.input_ids.shape
            check_labels(labels, torch.Size((batch_size, length - reader.num_missing)), "[B, T]", num_classes)
            check_ids("labels", labels[labels != ignore_index], num_classes, f"or {ignore_index} to be ignored")
            if isinstance(self.head, ForCausalLM):
                # Each token predicts the one after it.
                labels = F.pad(labels[:, 1:], (0, 1), value=ignore_index)
            labels = F.pad(labels, (0, reader.num_missing), value=ignore_index).long()
            if reader.mask is not None and ((reader.mask.cumsum(dim=1) == 0) & (labels != ignore_index)).any():
                raise ValueError(
                    "Padding on the left has a label, or is followed by one, which no real token before it predicts: set "
                    f"the labels of a row up to its first real token to {ignore_index}."
                )
            if self.num_items is None:
                self.num_items = (labels != ignore_index).sum()
        elif label_smoothing and (labels.dim() != 1 or labels.is_floating_point()):
            raise ValueError(
                f"`label_smoothing` is for classes, and `labels` are {labels.dtype} {list(labels.shape)}."
            )
        self.labels = labels

    def arguments(self, index: int) -> dict[str, Any]:
        """The arguments that let the model itself compute the part of a chunk, if it can."""
        if self.label_smoothing or (self.is_pooled and index < len(self.parts) - 1):
            return {}
        if self.is_pooled:
            return {"labels": self.labels}
        # The losses of transformers take views of their labels.
        labels = self.labels[:, self.parts[index]].contiguous()
        arguments = {"labels": labels, "num_items_in_batch": self.num_items, "ignore_index": self.ignore_index}
        return {**arguments, "shift_labels": labels} if isinstance(self.head, ForCausalLM) else arguments

    def of_chunk(self, index: int, outputs: Any) -> torch.Tensor | None:
        """The part of a chunk; `None` if sequences are classified, whose loss comes with the last chunk."""
        if self.is_pooled and index < len(self.parts) - 1:
            return None
        if outputs.loss is not None:
            return outputs.loss
        if self.is_pooled:
            return self._cross_entropy(outputs.logits, self.labels, "mean", self.label_smoothing)
        labels = self.labels[:, self.parts[index]]
        return self._cross_entropy(outputs.logits, labels, "sum", self.label_smoothing) / self.num_items

    def of_tokens(self, index: int, logits: torch.Tensor) -> torch.Tensor:
        """The negative log-likelihood `[B, T]` of the label of each token of a chunk."""
        labels = self.labels[:, self.parts[index]]
        return self._cross_entropy(logits, labels, "none", 0.0).view_as(labels)

    def _cross_entropy(
        self, logits: torch.Tensor, labels: torch.Tensor, reduction: str, label_smoothing: float
    ) -> torch.Tensor:
        return F.cross_entropy(
            logits.flatten(0, -2).to(torch.promote_types(logits.dtype, torch.float32)),
            labels.flatten().to(logits.device),
            reduction=reduction,
            ignore_index=self.ignore_index,
            label_smoothing=label_smoothing,
        )


def checked_head(model: nn.Module) -> nn.Module:
    """The model with a head inside of what wraps it, if it can be read in chunks."""
    heads = ForCausalLM, ForSequenceClassification, ForTokenClassification
    head = next((module for module in model.modules() if isinstance(module, heads)), None)
    if head is None or isinstance(model, nn.DataParallel):
        raise TypeError(
            "Chunks are read by a language model or a classifier of sequences or tokens of this package, which may be in "
            f"`DistributedDataParallel`, FSDP2 or adapters, got a {type(model).__name__}."
        )
    if not head.config.is_causal:
        raise ValueError(
            "A bidirectional model (`is_causal=False` in its config) sees all tokens at once and cannot read them in "
            "chunks. Train it on the whole sequence, or make it causal."
        )
    if head.config.num_hidden_layers == 0:
        raise ValueError("A model without layers hands no state from chunk to chunk: train it on the whole sequence.")
    if head.training and any(getattr(module, "gradient_checkpointing", False) for module in head.modules()):
        raise ValueError(
            "Gradient checkpointing drops the state between chunks, which save the same memory without it: call "
            "`model.gradient_checkpointing_disable()`."
        )
    for module in model.modules():
        for name, config in getattr(module, "peft_config", {}).items():
            if config.is_prompt_learning:
                raise ValueError(
                    f"The adapter {name!r} is a learned prompt ({config.peft_type.value}), which PEFT would put before every "
                    "chunk. Train another kind of adapter, such as LoRA, in chunks."
                )
    return head


def _grows(name: str) -> bool:
    """Whether it is the keys or the values of full attention, of which those before a chunk are the first."""
    return name.endswith((".keys", ".values"))


def _random_state(devices: list[torch.Tensor]) -> State:
    """The state of the random numbers of the processor, and by their index of the devices of some tensors."""
    indices, states = get_device_states(*devices)
    return {"processor": torch.get_rng_state(), **dict(zip(map(str, indices), states, strict=True))}


def _set_random_state(state: State) -> None:
    torch.set_rng_state(state["processor"])
    devices = {int(name): tensor for name, tensor in state.items() if name != "processor"}
    if devices:
        device_type = torch.accelerator.current_accelerator().type
        set_device_states(list(devices), list(devices.values()), device_type=device_type)


def _report(progress: Progress | None, done: int, total: int) -> None:
    if progress is not None:
        progress(done, total)


__all__ = ["ChunkedEvaluation", "backward_in_chunks", "evaluate_in_chunks"]
