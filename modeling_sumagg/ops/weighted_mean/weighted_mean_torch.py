"""Weighted means by two sums in PyTorch's operations: a segment, and one token."""

import torch

from ..running_sum.running_sum_torch import flat, scan, to_heads


FLOOR = 1e-30  # added to the constants that the sums are relative to, so that none is zero


def means_of_segment(terms, decays, weights, sums, total, documents=None, relu=False):
    """
    The means m = s / n of a segment, by s and n relative to constants c of the size of n. A mean does not depend on c. So
    only numbers of one size are divided, and no derivative has the square of a small weight below it.

    1. n in the dtype of the state, and c, a constant, of it.
    2. s / c: a scan with weights v / c and decays a c_{t-1} / c_t.
    3. m = (s / c) / (n / c), zero where n is.

    Args:
        terms (`torch.Tensor` of shape `[B, T, D]`, float32 or float64, `T` > 0): x, finite where masked.
        decays, weights (`torch.Tensor` of shape `[B or 1, T, K]`, dtype of `terms`): log a, zero where masked; v, likewise.
        sums, total, documents, relu: s and n before the segment, and the rest, as for `scan`.

    Returns:
        `tuple`: m in the dtype of `terms`; s and n after the segment; and n of each token, `[B, T, K]`, like `total`.
    """
    batch_size, length, _ = terms.shape
    wide, heads = total.dtype, decays.shape[2]
    # 1. The weights, and constants of their size; where a document begins, that before it does not matter.
    weights = weights.to(wide).expand(batch_size, length, heads)
    totals, last_total = scan(weights, decays.to(wide), total, documents)
    size, size_before, last_size = (tensor.detach() + FLOOR for tensor in (totals, total, last_total))
    before = torch.cat([size_before.unsqueeze(1), size[:, :-1]], 1)
    if documents is not None:
        before = torch.where(documents.starts.unsqueeze(2), size, before)

    # 2. The terms.
    terms = to_heads(terms.relu() if relu else terms, heads)
    terms = flat(terms * (weights / size).to(terms.dtype).unsqueeze(-1))
    relative_decays = (decays + (before / size).log()).to(terms.dtype)
    sums = flat(to_heads(sums, heads) / size_before.unsqueeze(-1))
    relative, last = scan(terms, relative_decays, sums, documents)

    # 3. The means.
    share = (totals / size).to(terms.dtype)
    means = flat(to_heads(relative, heads) / share.masked_fill(share == 0, 1).unsqueeze(-1))
    return means, flat(to_heads(last, heads) * last_size.unsqueeze(-1)), last_total, totals


def mean_of_token(terms, decays, weights, sums, total, relu=False):
    """The same of one token, `[B, 1, D]`, in few operations: launching them is the cost of a decode step."""
    decay, weights = decays[:, 0].to(total.dtype).exp(), weights[:, 0].to(total.dtype)
    heads = (terms.relu() if relu else terms).reshape(terms.shape[0], decay.shape[1], -1)
    total = torch.addcmul(weights, decay, total)
    sums = torch.addcmul(sums.view(heads.shape) * decay.unsqueeze(-1), heads, weights.unsqueeze(-1))
    means = sums / total.masked_fill(total == 0, 1).unsqueeze(-1)
    return means.view(terms.shape), sums.flatten(1), total
