"""The modulation of embeddings by their positions."""

import torch
from torch import nn

from ..common.positions import learned_positions, sinusoidal_positions


def modulate(inputs_embeds: torch.Tensor, positions: torch.Tensor, position_bias: float) -> torch.Tensor:
    """`E * (P + b)`, E and P broadcast to `[B, T, d]`, in the dtype of E and rounded once."""
    positions = positions.to(torch.promote_types(inputs_embeds.dtype, torch.float32))
    return (inputs_embeds * (positions + position_bias)).to(inputs_embeds.dtype)


class PositionModulation(nn.Module):
    """
    Position modulation, `h_t = E[x_t] * (P_t + b)`, elementwise.

    Args:
        hidden_size (`int`): the width `d`.
        position_embedding_type (`str`): P is a `"learned"` table, `"sinusoidal"`, or with `"none"` zero.
        max_position_embeddings (`int`): the rows of the learned table.
        position_bias (`float`): b.
    """

    def __init__(
        self, hidden_size: int, position_embedding_type: str, max_position_embeddings: int | None, position_bias: float
    ):
        super().__init__()
        self.position_embedding_type = position_embedding_type
        self.max_position_embeddings = max_position_embeddings
        self.position_bias = position_bias
        if position_embedding_type == "learned":
            self.position_embeddings = nn.Embedding(max_position_embeddings, hidden_size)

    def forward(self, inputs_embeds: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
        """
        Args:
            inputs_embeds (`torch.Tensor` of shape `[B, T, d]`): E[x_t].
            position_ids (`torch.Tensor` of shape `[1, T]` or `[B, T]`, integer): t.

        Returns:
            `torch.Tensor` of shape `[B, T, d]` in the dtype of `inputs_embeds`.

        Raises:
            `ValueError`: a position outside the learned table.
        """
        if self.position_embedding_type == "none":
            return inputs_embeds * self.position_bias
        if self.position_embedding_type == "learned":
            position_ids = position_ids.expand(inputs_embeds.shape[0], -1)
            positions = learned_positions(self.position_embeddings, position_ids, self.max_position_embeddings)
        else:
            positions = sinusoidal_positions(position_ids, inputs_embeds.shape[-1])
        return modulate(inputs_embeds, positions, self.position_bias)
