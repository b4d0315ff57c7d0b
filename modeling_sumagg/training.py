"""Defaults for training these models with tools that do not know them."""

from torch import nn


# The maps that mix tokens, as in PEFT's defaults for other models. A module is adapted if its name ends in one of these.
LORA_TARGET_MODULES = {
    "sumagg": ["in_proj", "hidden_proj", "q_proj", "v_proj"],
    "sumagg_multimodal": ["proj", "dense", "dense1", "dense2"],
    "tost": ["w_proj", "qkv"],
    "tost_text": ["w_proj", "q_proj", "v_proj"],
}

# Parameters with more than one dimension that are no weights of a linear map.
NOT_DECAYED = {"bias", "temperature", "membership_bias", "cls_token"}


def register_lora_target_modules() -> None:
    """Tell PEFT which layers of our models `LoraConfig()` adapts where it names no `target_modules`."""
    from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

    TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.update(LORA_TARGET_MODULES)


def decay_parameter_names(model: nn.Module) -> list[str]:
    """
    The parameters that weight decay is for: embeddings and the weights of linear maps and convolutions.

    As in the original models, norms, biases, layer scales, temperatures, the membership's bias β and class tokens do not
    decay. `Trainer` alone leaves out only biases and layer norms, by their names: override its
    `get_decay_parameter_names` with this.

    Returns:
        `list[str]`: the names, as in `model.named_parameters()`.
    """
    return [
        name
        for name, parameter in model.named_parameters()
        if parameter.dim() > 1 and name.rpartition(".")[2] not in NOT_DECAYED
    ]
