"""What the operators share about padding and documents."""

from typing import NamedTuple

import torch


class Documents(NamedTuple):
    """
    The documents of the tokens of a segment.

    Attributes:
        starts (`torch.Tensor` of shape `[B, T]`, bool): the first tokens of all documents but the first of a row.
        state_ids (`torch.Tensor` of shape `[B, T]`, int64, or `None`): where each document has a state of its own, which one
            is that of each token; `None` where a row has one state, that of its first document.
        mask (`torch.Tensor` of shape `[B, T]`, bool, or `None`): True where a token is real; read beside `state_ids` only.
    """

    starts: torch.Tensor
    state_ids: torch.Tensor | None = None
    mask: torch.Tensor | None = None

    def part(self, tokens: slice) -> "Documents":
        return Documents(*(None if tensor is None else tensor[:, tokens] for tensor in self))


def find_documents(
    document_ids: torch.Tensor | None, attention_mask: torch.Tensor | None, *, have_states: bool
) -> Documents | None:
    """
    The documents of `document_ids` `[B, T]`, `None` without; with `have_states` the ids are those of the states.

    Raises:
        `ValueError`: `have_states` without `document_ids`.
    """
    if document_ids is None:
        if have_states:
            raise ValueError(
                "An `initial_state` for each document, [B, R, …], needs the `document_ids` of the tokens."
            )
        return None
    document_ids = ids_of_tokens(document_ids, attention_mask)
    # With one difference for each token an exported graph holds for T = 2 as well.
    padded = torch.cat([document_ids[:, :1], document_ids], dim=1)
    starts = padded[:, 1:] != padded[:, :-1]
    if not have_states:
        return Documents(starts)
    return Documents(starts, document_ids.long(), None if attention_mask is None else attention_mask.bool())


def document_runs(document_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
    """
    Number the documents of each row 0, 1, 2, … in the order of the sequence.

    Args:
        document_ids (`torch.Tensor` of shape `[B, T]`, integer): a change from one real token to the next begins
            another document.
        attention_mask (`torch.Tensor` of shape `[B, T]`, bool or 0/1, *optional*): True where a token is real. The
            ids of masked positions are ignored: they belong to the document before them.

    Returns:
        `torch.Tensor` of shape `[B, T]`, int64, never decreasing along a row.
    """
    return find_documents(document_ids, attention_mask, have_states=False).starts.long().cumsum(dim=1)


def ids_of_tokens(document_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
    """`document_ids` `[B, T]` in which masked positions have the id of the real token before them, else of the first."""
    if attention_mask is None or document_ids.shape[1] == 0:
        return document_ids
    # The ids of the real tokens of a row by their rank, which is 1 for the first; what is masked is written to 0.
    real = attention_mask.bool()
    rank = real.long().cumsum(dim=1)
    ids = torch.zeros_like(torch.cat([document_ids, document_ids[:, :1]], dim=1))
    return ids.scatter(1, rank * real, document_ids).gather(1, rank.clamp_min(1))


def check_tokens(
    name: str, batch_size: int, length: int, attention_mask: torch.Tensor | None, document_ids: torch.Tensor | None
) -> None:
    """
    Check the arguments that say what the tokens of the argument `name` are.

    Raises:
        `TypeError`: `document_ids` is not integer.
        `ValueError`: a shape is not `[B, T]`.
    """
    for argument, tensor in (("attention_mask", attention_mask), ("document_ids", document_ids)):
        if tensor is not None and tensor.shape != (batch_size, length):
            raise ValueError(
                f"`{argument}` must have the shape [B, T] = [{batch_size}, {length}] of `{name}`, got "
                f"{list(tensor.shape)}."
            )
    if document_ids is not None and (document_ids.is_floating_point() or document_ids.dtype == torch.bool):
        raise TypeError(f"`document_ids` must be of an integer dtype, got {document_ids.dtype}.")
