"""A trainer for sequences that are too long to be read at once."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from accelerate.utils import broadcast_object_list
from torch import nn
from tqdm.auto import tqdm

from ..decoder.heads import ForSequenceClassification
from .chunks import Progress, backward_in_chunks, checked_head, evaluate_in_chunks
from .scripts import DecayTrainer
from .sequence_parallel import backward_in_parallel


class ChunkTrainer(DecayTrainer):
    """
    [`~transformers.Trainer`] whose steps and evaluations read their sequences in chunks, with the same gradients and losses
    ([`backward_in_chunks`], [`evaluate_in_chunks`]) in the memory of one chunk; or whose steps cut each sequence over all
    processes ([`~modeling_sumagg.training.sequence_parallel.backward_in_parallel`]).

    A line within the step counts the chunks that are read, and then those that their gradients have gone back over.

    Of a language model `compute_metrics` gets as its predictions the negative log-likelihood of every label but the first,
    `[B, T - 1]`, and not the logits, which are too many to keep.

    Args:
        args, kwargs: those of [`~transformers.Trainer`].
        chunk_length (`int`, *optional*): the tokens of a chunk; `None` reads each sequence at once, as `Trainer` does.
        sequence_parallel (`bool`, *optional*, defaults to `False`): whether all processes compute contiguous parts of each
            sequence, where `Trainer` gives whole sequences to each. The batches, losses and gradients of a step are those of
            `Trainer` with as many processes. With `chunk_length` they compute the sequence chunk by chunk, each process an
            equal part of a chunk.

    Raises:
        `TypeError`, `ValueError`: a model that cannot be read in chunks.
        `ValueError`: an option of `Trainer` that does not work with chunks, or `sequence_parallel` without processes.
    """

    def __init__(self, *args, chunk_length: int | None = None, sequence_parallel: bool = False, **kwargs):
        super().__init__(*args, **kwargs)
        self.chunk_length = chunk_length
        self.sequence_parallel = sequence_parallel
        if chunk_length is None and not sequence_parallel:
            return
        if sequence_parallel and not dist.is_initialized():
            raise ValueError(
                "`sequence_parallel` needs several processes: start them with `torchrun --nproc_per_node` or `accelerate "
                "launch`, or leave it out."
            )
        head = checked_head(self.model)
        parallelism = getattr(self.accelerator, "parallelism_config", None)
        refused = {
            "DeepSpeed": self.is_deepspeed_enabled,
            "`DataParallel` (several devices in one process)": self.args.n_gpu > 1,
            "sequence or context parallelism": parallelism is not None
            and (parallelism.cp_enabled or parallelism.sp_enabled),
            "`compute_loss_func`": self.compute_loss_func is not None,
            # It would make a step after each chunk.
            f"an optimizer that steps within the backward pass ({self.args.optim})": (
                "layerwise" in self.args.optim or "lomo" in self.args.optim
            ),
        }
        if sequence_parallel:
            refused["FSDP"] = self.is_fsdp_enabled
            refused["a classifier of sequences"] = isinstance(head, ForSequenceClassification)
            if chunk_length is not None and chunk_length % dist.get_world_size():
                raise ValueError(
                    f"With `sequence_parallel` each of the {dist.get_world_size()} processes computes an equal part of a chunk: "
                    f"`chunk_length` must be a multiple of it, got {chunk_length}."
                )
        way = "Chunks do not work", "`chunk_length=None`"
        if sequence_parallel:
            way = "`sequence_parallel` does not work", "`sequence_parallel=False`"
        for name, is_refused in refused.items():
            if is_refused:
                raise ValueError(f"{way[0]} with {name}: leave it out, or set {way[1]}.")

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        """The loss of a batch, whose gradients are added to those of the parameters."""
        if self.chunk_length is None and not self.sequence_parallel:
            return super().training_step(model, inputs, num_items_in_batch)
        model.train()
        if callable(getattr(self.optimizer, "train", None)):
            self.optimizer.train()
        if self.model_accepts_loss_kwargs and num_items_in_batch is not None:
            # Counted over all processes, whose gradients are averaged.
            factor = self.accelerator.num_processes if self.args.average_tokens_across_devices else 1
        else:
            num_items_in_batch, factor = None, 1 / self.current_gradient_accumulation_steps
        scaler = self.accelerator.scaler
        scale = 1.0 if scaler is None else scaler.scale(torch.ones((), device=self.args.device))
        options = {"label_smoothing": self.args.label_smoothing_factor, "loss_scale": scale * factor}
        with self.compute_loss_context_manager():
            if self.sequence_parallel:
                return self._step_in_parallel(model, inputs, num_items_in_batch, options) * factor
            with self._progress_line() as progress:
                loss = backward_in_chunks(
                    model,
                    **self._prepare_inputs(inputs),
                    chunk_length=self.chunk_length,  # type: ignore[arg-type]
                    num_items_in_batch=num_items_in_batch,
                    progress=progress,
                    **options,
                )
        return loss * factor

    def _step_in_parallel(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        num_items_in_batch: torch.Tensor | int | None,
        options: dict[str, Any],
    ) -> torch.Tensor:
        """The mean loss of the batches of all processes: they compute the batch of the first together, then the next."""
        num_processes = self.accelerator.num_processes
        options = {**options, "loss_scale": options["loss_scale"] / num_processes}
        # `DistributedDataParallel` would average gradients that are sums already.
        plain = self.accelerator.unwrap_model(model)
        losses = []
        for process in range(num_processes):
            batch, num_items = broadcast_object_list([inputs, num_items_in_batch], from_process=process)
            batch = self._prepare_inputs({**batch, "num_items_in_batch": num_items})
            with self._progress_line() as progress:
                options |= {"chunk_length": self.chunk_length, "progress": progress}
                losses.append(backward_in_parallel(plain, **batch, **options))
        return torch.stack(losses).mean()

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
        """The loss, the predictions and the labels of a batch."""
        if self.chunk_length is None:
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        inputs = self._prepare_inputs(inputs)
        with self.compute_loss_context_manager(), self._progress_line() as progress:
            found = evaluate_in_chunks(
                model,
                **inputs,
                chunk_length=self.chunk_length,
                label_smoothing=self.args.label_smoothing_factor,
                progress=progress,
            )
        if prediction_loss_only:
            return found.loss, None, None
        predictions = found.logits if found.token_losses is None else found.token_losses[:, 1:]
        return found.loss, predictions, inputs.get("labels")

    @contextlib.contextmanager
    def _progress_line(self) -> Iterator[Progress | None]:
        """What counts the readings of chunks in a line that is there after a second, and only until the end."""
        if self.args.disable_tqdm or not self.is_world_process_zero():
            yield None
            return
        with tqdm(delay=1, leave=False) as line:

            def report(done: int, total: int) -> None:
                num_chunks = (total + 1) // 2 if self.model.training else total
                is_back = done >= num_chunks and self.model.training
                count = done - num_chunks + 1 if is_back else done
                line.total = total
                line.set_description(
                    f"{count} of {num_chunks} chunks {'gone back' if is_back else 'read'}", refresh=False
                )
                line.update(done - line.n)

            yield report


__all__ = ["ChunkTrainer"]
