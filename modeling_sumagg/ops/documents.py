"""What the operators share about padding and documents."""

import torch


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
    if document_ids.shape[1] == 0:
        return document_ids.long()
    if attention_mask is not None:
        real = attention_mask.bool()
        index = torch.arange(real.shape[1], device=real.device).expand_as(real)
        last_real = torch.where(real, index, -1).cummax(dim=1)[0]
        first_real = real.int().argmax(dim=1, keepdim=True)
        document_ids = document_ids.gather(1, torch.where(last_real < 0, first_real, last_real))
    # With one difference for each token an exported graph holds for T = 2 as well.
    changes = document_ids.diff(dim=1, prepend=document_ids[:, :1]) != 0
    return changes.long().cumsum(dim=1)


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
