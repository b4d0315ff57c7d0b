"""The number of each document in its row."""

import torch

from .documents import find_documents


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
    return find_documents(document_ids, attention_mask).ids
