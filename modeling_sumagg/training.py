"""Defaults for training these models with tools that do not know them."""

from torch import nn

from .families import FAMILIES


def decay_parameter_names(model: nn.Module) -> list[str]:
    """
    The parameters that weight decay is for: embeddings and the weights of linear maps and convolutions.

    As in the original models, norms, biases, layer scales, temperatures, the membership's bias β and class tokens do not
    decay. `Trainer` alone leaves out only biases and layer norms, by their names: override its
    `get_decay_parameter_names` with this.

    Returns:
        `list[str]`: the names, as in `model.named_parameters()`.
    """
    family = FAMILIES.get(getattr(getattr(model, "config", None), "model_type", ""))
    not_decayed = {"bias", *(family.not_decayed if family is not None else ())}
    return [
        name
        for name, parameter in model.named_parameters()
        if parameter.dim() > 1 and name.rpartition(".")[2] not in not_decayed
    ]
