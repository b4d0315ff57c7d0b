"""Save a checkpoint of every family, with what the model makes of an input beside it, to be read by `load.py`."""

import json
import sys
from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForCTC,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    PreTrainedModel,
    set_seed,
)

from modeling_sumagg import (
    SumAggConfig,
    SumAggForMultimodalRegression,
    SumAggMultimodalConfig,
    SumAggSpeechConfig,
    ToSTConfig,
    ToSTTextConfig,
)


TEXT = {
    "vocab_size": 40,
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "sliding_window": 4,
    "position_embedding_type": "sinusoidal",
    "eos_token_id": None,
}
LAYERS = ["sliding_attention", "full_attention"]
IDS = torch.tensor([[5, 9, 2, 30, 7, 7, 11, 4], [3, 4, 8, 15, 16, 23, 39, 1]])
MODELS = {
    "AutoModelForCausalLM-sumagg": (
        AutoModelForCausalLM.from_config,
        SumAggConfig(**TEXT, layer_types=["summation", *LAYERS]),
        {"input_ids": IDS, "labels": IDS},
    ),
    "AutoModelForCausalLM-tost_text": (
        AutoModelForCausalLM.from_config,
        ToSTTextConfig(**TEXT, layer_types=["token_statistics", *LAYERS]),
        {"input_ids": IDS, "labels": IDS},
    ),
    "AutoModelForSequenceClassification-sumagg": (
        AutoModelForSequenceClassification.from_config,
        SumAggConfig(**TEXT, layer_types=["summation", *LAYERS], num_labels=3),
        {"input_ids": IDS, "labels": torch.tensor([2, 0])},
    ),
    "AutoModelForImageClassification-tost": (
        AutoModelForImageClassification.from_config,
        ToSTConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, patch_size=8, image_size=16),
        {"pixel_values": torch.linspace(-1, 1, 2 * 3 * 16 * 16).view(2, 3, 16, 16), "labels": torch.tensor([1, 0])},
    ),
    "AutoModelForSequenceClassification-multimodal": (
        SumAggForMultimodalRegression,
        SumAggMultimodalConfig(vocab_size=40, num_numeric_features=2, hidden_size=16, head_hidden_sizes=[8]),
        {"input_ids": IDS, "numeric_features": torch.tensor([[0.5, -1.0], [2.0, 0.0]]), "labels": torch.zeros(2, 1)},
    ),
    "AutoModelForCTC-sumagg_speech": (
        AutoModelForCTC.from_config,
        SumAggSpeechConfig(
            num_mel_bins=5,
            vocab_size=40,
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            layer_types=["summation", "sliding_attention"],
            sliding_window=4,
            mask_feature_length=2,
            apply_spec_augment=False,
        ),
        {
            "input_features": torch.linspace(-9, 9, 2 * 40 * 5).view(2, 40, 5).sin(),
            "labels": torch.tensor([[5, 9], [3, -100]]),
        },
    ),
}


@torch.no_grad()
def greedy_alone(model: PreTrainedModel, row: list[int], num_tokens: int) -> list[int]:
    """Greedy decoding by full forward passes, in which no cache has a part."""
    tokens = list(row)
    for _ in range(num_tokens):
        tokens.append(model(torch.tensor([tokens]), use_cache=False).logits[0, -1].argmax().item())
    return tokens[len(row) :]


def main(folder: Path) -> None:
    folder.mkdir(parents=True)
    for name, (build, config, inputs) in MODELS.items():
        set_seed(0)
        model = build(config).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.2)
            logits = model(**inputs).logits
        model.save_pretrained(folder / name)
        record = {key: tensor.tolist() for key, tensor in {**inputs, "logits": logits}.items()}
        if model.can_generate():
            record["rows"] = [IDS[0].tolist(), IDS[1, 3:].tolist()]
            record["tokens"] = [greedy_alone(model, row, 6) for row in record["rows"]]
        (folder / f"{name}.json").write_text(json.dumps(record))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
