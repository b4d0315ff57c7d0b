"""Positions of tokens: the sinusoidal and the rotary code, and the look-up of learned ones."""

from collections.abc import Callable

import torch
from transformers import PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS


def sinusoidal_positions(position_ids: torch.Tensor, hidden_size: int) -> torch.Tensor:
    """
    The sinusoidal position code of "Attention Is All You Need" (arXiv 1706.03762): sines in the first half of the
    channels, cosines in the second, of `position / 10000^(2i / d)`.

    Args:
        position_ids (`torch.Tensor` of shape `[..., T]`, integer): positions of any size.
        hidden_size (`int`): `d`, even.

    Returns:
        `torch.Tensor` of shape `[..., T, d]`, float32.
    """
    # In float32 a position of a million would be off by 0.03 radians; Apple's GPUs have no float64.
    dtype = torch.float32 if position_ids.device.type == "mps" else torch.float64
    channels = torch.arange(0, hidden_size, 2, device=position_ids.device, dtype=dtype)
    angles = position_ids[..., None].to(dtype) * 10000.0 ** (-channels / hidden_size)
    return torch.cat([angles.sin(), angles.cos()], dim=-1).float()


def rotary_positions(config: PreTrainedConfig, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """
    The cosines and sines of rotary positions (RoFormer, arXiv 2104.09864), as transformers' Llama applies them.

    Args:
        config (`PreTrainedConfig`): with `rope_parameters`, and the width of attention heads, p.
        position_ids (`torch.Tensor` of shape `[..., T]`, integer): positions of any size.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: both `[..., T, p]`, float32.
    """
    # Computed for each segment: a buffer would be rounded with the model.
    dtype = torch.float32 if position_ids.device.type == "mps" else torch.float64
    parameters, scale = config.rope_parameters, 1.0
    if parameters["rope_type"] in ("default", "linear"):
        head_dim = getattr(config, "head_dim", config.hidden_size // config.num_attention_heads)
        channels = torch.arange(0, head_dim, 2, device=position_ids.device, dtype=dtype)
        frequencies = float(parameters["rope_theta"]) ** (-channels / head_dim) / parameters.get("factor", 1.0)
    else:
        frequencies, scale = ROPE_INIT_FUNCTIONS[parameters["rope_type"]](config, position_ids.device)
    angles = position_ids[..., None].to(dtype) * frequencies
    angles = torch.cat([angles, angles], dim=-1)
    return (angles.cos() * scale).float(), (angles.sin() * scale).float()


def learned_positions(table: Callable, position_ids: torch.Tensor, size: int | None) -> torch.Tensor:
    """
    What `table` has learned for each position, `table(position_ids)`.

    Hand it `[B, T]`, one row for each sequence, where it is a module: adapters may differ from row to row.

    Args:
        table (`Callable`): an embedding table, or another function of positions.
        position_ids (`torch.Tensor` of shape `[..., T]`, integer): positions.
        size (`int`): the rows of the table.

    Raises:
        `ValueError`: a position beyond the table; the message tells what to do.
    """
    try:
        return table(position_ids)
    except IndexError:
        longest = int(position_ids.max()) + 1
        raise ValueError(
            f"A document of {longest} tokens is too long for this model, which has learned positions for {size} "
            f"(`config.max_position_embeddings`). Cut documents there (`truncation=True, max_length={size}` in the call "
            "of a tokenizer or a pipeline), or train a model without that limit (`position_embedding_type='sinusoidal'` "
            "or `'none'`)."
        ) from None
