"""Padding and documents: what all operators share."""

from collections.abc import Callable
from typing import NamedTuple

import torch


class Documents(NamedTuple):
    """
    The documents of the tokens of a segment. A masked token belongs to the document of the real token before it, else to
    the first document.

    Attributes:
        ids (`torch.Tensor` of shape `[B, T]`, int64): the document of each token: 0, 1, 2, … in the order of the row.
        starts (`torch.Tensor` of shape `[B, T]`, bool): the first real tokens of all documents but the first of a row.
    """

    ids: torch.Tensor
    starts: torch.Tensor


def takes_documents(operator: Callable) -> Callable:
    """Mark an operator whose `document_ids` may be [`Documents`], so that nothing is derived from ids in each layer."""
    operator.takes_documents = True
    return operator


def has_tokens_at(dimensions: dict[int | str, int]) -> Callable[[Callable], Callable]:
    """Mark an operator with the dimension of the tokens in its arguments, by place or name, where it is not 1."""

    def mark(operator: Callable) -> Callable:
        operator.token_dims = dimensions
        return operator

    return mark


def find_documents(
    document_ids: "torch.Tensor | Documents | None", attention_mask: torch.Tensor | None = None
) -> Documents | None:
    """
    The documents of a segment.

    Args:
        document_ids (`torch.Tensor` of shape `[B, T]`, integer, or `Documents`, *optional*): a change from one real token to
            the next begins another document. [`Documents`] are returned as they are.
        attention_mask (`torch.Tensor` of shape `[B, T]`, bool or 0/1, *optional*): True where a token is real.
    """
    if document_ids is None or isinstance(document_ids, Documents):
        return document_ids
    if attention_mask is not None and document_ids.shape[1] > 0:
        # The ids of the real tokens of a row by their rank, which is 1 for the first; masked ids are written to 0.
        real = attention_mask.bool()
        rank = real.long().cumsum(dim=1)
        ids = torch.zeros_like(torch.cat([document_ids, document_ids[:, :1]], dim=1))
        document_ids = ids.scatter(1, rank * real, document_ids).gather(1, rank.clamp_min(1))
    # With one difference for each token an exported graph holds for T = 2 as well.
    padded = torch.cat([document_ids[:, :1], document_ids], dim=1)  # type: ignore[call-overload]
    starts = padded[:, 1:] != padded[:, :-1]
    return Documents(starts.long().cumsum(dim=1), starts)


def check_tokens(
    name: str,
    batch_size: int,
    length: int,
    attention_mask: torch.Tensor | None,
    document_ids: torch.Tensor | Documents | None,
) -> None:
    """
    Check the arguments that say what the tokens of the argument `name` are.

    Raises:
        `TypeError`: `document_ids` is not integer.
        `ValueError`: a shape is not `[B, T]`.
    """
    ids = document_ids.ids if isinstance(document_ids, Documents) else document_ids
    for argument, tensor in (("attention_mask", attention_mask), ("document_ids", ids)):
        if tensor is not None and tensor.shape != (batch_size, length):
            raise ValueError(
                f"`{argument}` must have the shape [B, T] = [{batch_size}, {length}] of `{name}`, got "
                f"{list(tensor.shape)}."
            )
    if ids is not None and (ids.is_floating_point() or ids.dtype == torch.bool):
        raise TypeError(f"`document_ids` must be of an integer dtype, got {ids.dtype}.")
