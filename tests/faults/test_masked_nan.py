"""NaN in embeddings behind a mask reaches no output of a real token, and no gradient."""

import pytest
import torch
from testing import assert_close

from .kinds import KINDS, marked, padded_inputs, tiny_model


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", marked(KINDS))
def test_nan_behind_a_mask(kind, attention):
    model = tiny_model(kind)
    model.set_attn_implementation(attention)
    inputs = padded_inputs()
    mask = inputs["attention_mask"].bool()
    embeddings = model.get_input_embeddings()(inputs["input_ids"]).detach()
    results = []
    for behind in (0.0, torch.nan, torch.inf):
        embeds = embeddings.masked_fill(~mask[..., None], behind).requires_grad_()
        model.zero_grad()
        logits = model(inputs_embeds=embeds, attention_mask=mask, use_cache=False).logits
        logits = logits[mask] if logits.dim() == 3 else logits
        logits.square().sum().backward()
        gradients = [parameter.grad.flatten() for parameter in model.parameters() if parameter.grad is not None]
        results.append((logits, embeds.grad, torch.cat(gradients)))
    for result in results[1:]:
        for actual, expected in zip(result, results[0], strict=True):
            assert_close(actual, expected)
