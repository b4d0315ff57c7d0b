"""Checks of the values of a model's inputs, so that no embedding or loss fails on them deep inside."""

import sys
from collections.abc import Callable

import torch
from torch import nn
from torch.fx.experimental.proxy_tensor import get_proxy_mode
from transformers import PreTrainedConfig
from transformers.utils import is_tracing


def is_concrete(tensor: torch.Tensor) -> bool:
    """
    Whether Python may read and act on the values of `tensor`.

    Not so while a graph is traced, compiled, exported or captured, for fake and meta tensors, which have no values,
    and under the transforms of `torch.func`, where one tensor stands for the values of many samples.
    """
    return (
        tensor.device.type != "meta"
        and not is_tracing(tensor)
        and not torch._C._are_functorch_transforms_active()
        and get_proxy_mode() is None
    )


def check_ids(name: str, ids: torch.Tensor, size: int, what: str) -> None:
    """
    Check the ids of an embedding table (where they can be read, see [`is_concrete`]).

    Args:
        name (`str`): the argument that they came in.
        ids (`torch.Tensor` of any shape, integer): the ids.
        size (`int`): the rows of the table.
        what (`str`): what these rows are.

    Raises:
        `ValueError`: an id is not in [0, size).
    """
    if ids.numel() == 0 or not is_concrete(ids):
        return
    low, high = torch.stack(torch.aminmax(ids)).tolist()
    if low < 0 or high >= size:
        raise ValueError(f"`{name}` must be in [0, {size}), {what}, got values from {low} to {high}.")


def look_up(embedding: nn.Module, ids: torch.Tensor, name: str, size: int, what: str) -> torch.Tensor:
    """
    `embedding(ids)`, without reading the ids first; only where the look-up fails, which it does at once on a CPU.

    Args:
        embedding (`nn.Module`): the table, or what wraps it.
        ids, name, size, what: as for [`check_ids`], whose error is raised.
    """
    try:
        return embedding(ids)
    except IndexError:
        check_ids(name, ids, size, what)
        raise


def check_labels(labels: torch.Tensor, shape: torch.Size, meaning: str, num_classes: int | None) -> None:
    """
    Check the shape and the dtype of labels.

    Args:
        labels (`torch.Tensor`): the labels.
        shape (`torch.Size`): the shape that they must have.
        meaning (`str`): that shape in letters.
        num_classes (`int`, *optional*): labels are indices of so many classes. `None`: they are any numbers.

    Raises:
        `ValueError`: another shape; or class indices that are not integers.
    """
    if labels.shape != shape:
        raise ValueError(f"`labels` must have the shape {meaning} = {list(shape)}, got {list(labels.shape)}.")
    if num_classes is None:
        return
    if labels.dtype == torch.bool or labels.is_floating_point():
        raise ValueError(
            f"`labels` are indices of {num_classes} classes and must be of an integer dtype, got {labels.dtype}: pass "
            "`labels.long()`, or set `config.problem_type` to what they are."
        )


def loss_of_classes(loss_function: Callable, labels: torch.Tensor, num_classes: int, **kwargs) -> torch.Tensor:
    """
    `loss_function(labels=labels, **kwargs)`, without reading the labels first; only where the loss fails on them, which
    it does at once on a CPU.

    Args:
        loss_function (`Callable`): a loss over classes.
        labels (`torch.Tensor` of any shape, integer): indices of classes.
        num_classes (`int`): how many there are.
        kwargs: the other arguments of the loss, `ignore_index` (by default -100) among them.

    Raises:
        `ValueError`: a label of a class that does not exist.
    """
    try:
        return loss_function(labels=labels, **kwargs)
    except (IndexError, RuntimeError):
        if not is_concrete(labels):
            raise
        ignored = kwargs.get("ignore_index", -100)
        unknown = labels[(labels != ignored) & ((labels < 0) | (labels >= num_classes))].tolist()
        if not unknown:
            raise
        raise ValueError(
            f"`labels` must be in [0, {num_classes}), or {ignored} to be ignored, got {unknown[0]}."
        ) from None


def labels_of_rows(labels: torch.Tensor, logits: torch.Tensor, config: PreTrainedConfig) -> torch.Tensor:
    """
    The labels of a head that gives one prediction a row, checked, as the loss takes them.

    Args:
        labels (`torch.Tensor`): by `config.problem_type`, class indices `[B]`; or values `[B, num_labels]`, or `[B]`
            for one label; or 0 and 1 (or False and True) `[B, num_labels]` for several labels. Where it is not set,
            one number a row is a class, unless there is only one label.
        logits (`torch.Tensor` of shape `[B, num_labels]`): the predictions.
        config (`PreTrainedConfig`): with `num_labels` and `problem_type`.

    Returns:
        `torch.Tensor`: class indices in int64, everything else in the dtype of `logits`, on its device.

    Raises:
        `ValueError`: as [`check_labels`].
    """
    is_class = config.problem_type == "single_label_classification" or (
        config.problem_type is None and config.num_labels > 1 and labels.dim() < 2
    )
    if is_class:
        check_labels(labels, logits.shape[:1], "[B]", config.num_labels)
        return labels.to(logits.device, torch.long)
    if config.num_labels == 1 and labels.dim() == 1:
        check_labels(labels, logits.shape[:1], "[B]", None)
    else:
        check_labels(labels, logits.shape, "[B, num_labels]", None)
    return labels.to(logits)


def refuse_sequence_parallelism() -> None:
    """
    Refuse to run in processes between which accelerate cuts each sequence (`ParallelismConfig(sp_size=...)` or `cp_size`).

    Attention gathers the parts there; a state would start from zero in each. accelerate's own check of `sp_size` knows the
    layer type `"linear_attention"` alone, and older versions do not check `cp_size`.

    Raises:
        `ValueError`: sequence or context parallelism is on.
    """
    state = sys.modules.get("accelerate.state")
    parallelism = None if state is None else state.AcceleratorState._shared_state.get("parallelism_config")
    for name in ("sp_size", "cp_size"):
        # Not every version of accelerate knows both.
        size = getattr(parallelism, name, 1)
        if size > 1:
            raise ValueError(
                f"Sequence parallelism (`{name}={size}` in accelerate's `ParallelismConfig`) is for models of full attention "
                f"alone: the states of this one would begin anew in each process. Set `{name}=1`. To cut a sequence between "
                "processes, use `ChunkTrainer(..., sequence_parallel=True)` of `modeling_sumagg.training.chunk_trainer`, or "
                "`backward_in_parallel` of `modeling_sumagg.training.sequence_parallel`."
            )
