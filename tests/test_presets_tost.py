"""The published ToST vision sizes."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForImageClassification

from modeling_sumagg import ToSTForImageClassification
from modeling_sumagg.configuration import preset_path


# hidden size, blocks, heads, initial layer scale
PUBLISHED = {
    "tiny-12": (192, 12, 4, 1.0),
    "small-12": (384, 12, 8, 1.0),
    "tiny-24": (192, 24, 4, 1e-5),
    "small-24": (384, 24, 8, 1e-5),
    "medium-24": (512, 24, 8, 1e-5),
    "large-24": (768, 24, 16, 1e-5),
}


def count_parameters(d: int, blocks: int, heads: int, patch_size: int) -> int:
    """Every weight and bias, from the description of the architecture."""
    widths = {16: (3, d // 8, d // 4, d // 2, d), 8: (3, d // 4, d // 2, d)}[patch_size]
    # 3 x 3 convolutions without bias, each with the scale and shift of a batch norm.
    stem = sum(9 * inputs * outputs + 2 * outputs for inputs, outputs in zip(widths, widths[1:], strict=False))
    position = 64 * d + d
    norms_and_scales = 2 * 2 * d + 2 * d
    mlp = d * 4 * d + 4 * d + 4 * d * d + d
    block = norms_and_scales + (d * d + d) + heads + (d * d + d) + mlp
    class_block = norms_and_scales + (3 * d * d + 3 * d) + (d * d + d) + mlp
    class_token, final_norm, head = d, 2 * d, 1000 * d + 1000
    return stem + position + blocks * block + 2 * class_block + class_token + final_norm + head


@pytest.mark.parametrize("patch_size", [16, 8])
@pytest.mark.parametrize("size", PUBLISHED)
def test_preset_is_the_published_architecture(size, patch_size):
    hidden_size, blocks, heads, layer_scale = PUBLISHED[size]
    config = AutoConfig.from_pretrained(preset_path(f"tost-{size}-p{patch_size}"))
    with torch.device("meta"):
        model = AutoModelForImageClassification.from_config(config)
    assert type(model) is ToSTForImageClassification
    assert model.num_parameters() == count_parameters(hidden_size, blocks, heads, patch_size)
    assert (config.image_size, config.layerscale_value) == (224, layer_scale)
    logits = model(torch.empty(2, 3, 224, 224, device="meta")).logits
    assert logits.shape == (2, 1000)
    hidden_states = model(torch.empty(1, 3, 224, 224, device="meta"), output_hidden_states=True).hidden_states
    assert hidden_states[-1].shape == (1, (224 // patch_size) ** 2, hidden_size)
