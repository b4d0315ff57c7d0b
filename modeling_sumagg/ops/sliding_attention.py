"""Causal sliding-window attention in time and memory linear in the sequence."""

import torch
import torch.nn.functional as F


def sliding_window_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    sliding_window: int,
    scaling: float,
    num_sinks: int = 0,
    dropout_p: float = 0.0,
    positions: torch.Tensor | None = None,
) -> torch.Tensor:
    """
    Softmax attention in which each query sees the `sliding_window` keys that end with its own, of its document.

    The queries are cut into blocks of one window. A block sees its own keys and those of the block before, so that a
    mask of two windows replaces the one of T × T. It sees the first `num_sinks` keys too.

    Args:
        query (`torch.Tensor` of shape `[B, H, T, p]`): the queries.
        key, value (`torch.Tensor` of shape `[B, H, P + T, p]`): those of the `P < sliding_window + num_sinks` tokens
            before the first query, and of the queries' own tokens.
        sliding_window (`int`): the keys a query sees, its own included.
        scaling (`float`): factor of the scores.
        num_sinks (`int`, defaults to 0): the keys from the first one on that every later query sees.
        dropout_p (`float`, defaults to 0.0): dropout on the probabilities; for training only.
        positions (`torch.Tensor` of shape `[B, T]`, integer, *optional*): those of the queries in their documents, counted
            from 0. A query sees no key further back, so that several documents may stand in a row.

    Returns:
        `torch.Tensor` of shape `[B, H, T, p]`. With `positions` a NaN or an infinity in a key or value of one document
        reaches no query of another.

    Raises:
        `ValueError`: more keys before the first query than the window reaches.
    """
    batch_size, num_heads, length, head_dim = query.shape
    past = key.shape[2] - length
    most = sliding_window - 1 + num_sinks
    if not 0 <= past <= most or (num_sinks and positions is not None):
        raise ValueError(
            f"A window of {sliding_window} with {num_sinks} sinks takes 0 to {most} keys before the first query, got "
            f"{past}, and with sinks no `positions`."
        )
    sinks = [x[:, :, :num_sinks] for x in (key, value)]
    hidden = max(past - sliding_window + 1, 0)
    past -= hidden
    key, value = key[:, :, hidden:], value[:, :, hidden:]
    # Of positive numbers, as ONNX rounds a negative quotient up.
    num_blocks = (length + sliding_window - 1) // sliding_window
    end = num_blocks * sliding_window - length

    def blocks(x: torch.Tensor) -> torch.Tensor:
        """Keys as `[B · blocks, H, 2 windows, p]`, the first block beginning one window before the first query."""
        x = F.pad(x, (0, 0, sliding_window - past, end))
        x = x.reshape(batch_size, num_heads, num_blocks + 1, sliding_window, x.shape[3])
        pairs = torch.cat([x[:, :, :-1], x[:, :, 1:]], dim=3)
        return pairs.transpose(1, 2).flatten(0, 1)

    query = F.pad(query, (0, 0, 0, end)).unflatten(2, (num_blocks, sliding_window)).transpose(1, 2).flatten(0, 1)
    rows = torch.arange(sliding_window, device=query.device)[:, None]
    columns = torch.arange(2 * sliding_window, device=query.device)
    visible = (columns > rows) & (columns <= rows + sliding_window)
    # Only the first block reaches back to where there is no key.
    exists = columns >= F.pad(columns.new_full((1,), sliding_window - past), (0, num_blocks - 1))[:, None, None]
    mask = (visible & exists)[None, :, None].expand(batch_size, -1, -1, -1, -1).flatten(0, 1)
    key, value = blocks(key), blocks(value)
    if num_sinks:
        # Where the window reaches a sink, the query sees it there.
        place = torch.arange(num_blocks * sliding_window, device=query.device).view(num_blocks, 1, sliding_window, 1)
        beyond = place + past + hidden - torch.arange(sinks[0].shape[2], device=query.device) >= sliding_window
        mask = torch.cat([beyond.repeat(batch_size, 1, 1, 1), mask], dim=3)
        sinks = [x.repeat_interleave(num_blocks, 0) for x in sinks]
        key, value = torch.cat([sinks[0], key], dim=2), torch.cat([sinks[1], value], dim=2)
    is_lost = None
    if positions is not None:
        positions = F.pad(positions, (0, end)).reshape(mask.shape[0], 1, sliding_window, 1)
        mask = mask & (rows + sliding_window - columns <= positions)
        # Zero times NaN is NaN: what is no finite number is left out, and lost to the queries that see it.
        is_bad = ~(key.isfinite() & value.isfinite()).all(dim=3).unsqueeze(2)
        key, value = (x.masked_fill(is_bad.transpose(-1, -2), 0) for x in (key, value))
        is_lost = (mask & is_bad).any(dim=3, keepdim=True)
    output = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scaling, dropout_p=dropout_p)
    output = output if is_lost is None else output.masked_fill(is_lost, torch.nan)
    return output.unflatten(0, (batch_size, num_blocks)).transpose(1, 2).flatten(2, 3)[:, :, :length]
