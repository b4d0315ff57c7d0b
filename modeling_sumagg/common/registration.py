"""Register the classes of a checkpoint's code. A checkpoint carries this file.

Several copies of a family, one installed and others that came with checkpoints, may register in one process.
"""

import transformers
from transformers import PreTrainedModel


def register_class_names(model_type: str, models: dict[str, type[PreTrainedModel]]) -> None:
    """
    Make the task of each class known by its name: to pipelines, and to `Trainer`, which shifts smoothed labels for
    language models. The Auto classes know classes by their config, and do not tell.

    Args:
        model_type (`str`): the name of the family.
        models (`dict[str, type[PreTrainedModel]]`): the model of each Auto class, by the name of the latter.
    """
    for auto_name, model_class in models.items():
        names = getattr(transformers, auto_name)._model_mapping._model_mapping
        names.setdefault(model_type, model_class.__name__)
        if model_class.__name__ not in names.values():
            # Another copy has another class for this task.
            names[model_class.__name__] = model_class.__name__


def register_family(*args, **kwargs) -> None:
    """In a checkpoint, the `register_family` that modules import. It does nothing: each file registers its own classes."""
