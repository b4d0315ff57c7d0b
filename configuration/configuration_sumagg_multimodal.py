"""Configuration of the multimodal summation aggregation model."""

import math
from typing import Any, Literal

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from .configuration_fields import NamedFields


@strict
class SumAggMultimodalConfig(NamedFields, PreTrainedConfig):
    r"""
    Configuration of a [`SumAggForMultimodalRegression`]: text, numbers and images, each summed into one latent vector.

    The architecture is that of P. Ekin, "Summation-Based Transformers: A Path Toward Linear Complexity Sequence
    Modeling" (TechRxiv 2025, doi 10.36227/techrxiv.175790522.25734653), with images as a further modality. The defaults
    are the published ones. The model has a modality only if its size is set.

    Args:
        vocab_size (`int`, *optional*, defaults to 10000): number of token ids; `None`: no text.
        num_numeric_features (`int`, defaults to 0): number `F` of scalar features; 0: no numbers.
        image_size (`int` or pair of `int` (height, width), *optional*): size of the images; `None`: no images.
        hidden_size (`int`, defaults to 256): width `d` of every modality and of their sum, the latent.
        max_position_embeddings (`int`, defaults to 512): rows of the learned table of positions, the longest text.
        position_embedding_type (`str`, defaults to `"learned"`): the positions of tokens: `"learned"`, as published,
            `"sinusoidal"` (computed, for unlimited length) or `"none"`. The positions of patches are learned.
        position_bias (`float`, defaults to 1.0): the `b` of `E[x] * (P + b)`.
        patch_size (`int`, defaults to 16): side of the square patches of an image.
        num_channels (`int`, defaults to 3): channels of the images.
        numeric_mean (`list[float]`, *optional*): mean of each numeric feature in the training data. With
            `numeric_std`, the model standardises the features itself and takes them in their own units.
        numeric_std (`list[float]`, *optional*): their standard deviations.
        label_mean (`list[float]`, *optional*): mean of each label in the training data. With `label_std`, the
            regression predicts in the labels' own units, and computes its loss on standardised labels.
        label_std (`list[float]`, *optional*): their standard deviations.
        head_hidden_sizes (`list[int]`, *optional*, defaults to `[256, 64]`): widths of the layers from the latent to
            the output.
        classifier_dropout (`float`, defaults to 0.2): dropout before the output.
        problem_type (`str`, defaults to `"regression"`): `"regression"` (mean squared error),
            `"single_label_classification"` or `"multi_label_classification"`.
        num_labels (`int`, *optional*, defaults to 1): number of outputs.
        initializer_range (`float`, defaults to 0.02): standard deviation of the initial embeddings and positions.

    Raises:
        `ValueError` or the strict dataclass's validation error: a value is of the wrong type or not allowed, or there
            is no modality.

    Example:

    ```python
    >>> from modeling_sumagg import SumAggForMultimodalRegression, SumAggMultimodalConfig

    >>> config = SumAggMultimodalConfig(
    ...     vocab_size=1000, num_numeric_features=2, numeric_mean=[41.0, 2.5], numeric_std=[12.0, 1.5]
    ... )
    >>> config.num_labels
    1
    >>> model = SumAggForMultimodalRegression(config)
    ```
    """

    model_type = "sumagg_multimodal"

    vocab_size: int | None = 10000
    num_numeric_features: int = 0
    image_size: int | list[int] | tuple[int, int] | None = None
    hidden_size: int = 256
    max_position_embeddings: int = 512
    position_embedding_type: Literal["learned", "sinusoidal", "none"] = "learned"
    position_bias: float | int = 1.0
    patch_size: int = 16
    num_channels: int = 3
    numeric_mean: list[float | int] | None = None
    numeric_std: list[float | int] | None = None
    label_mean: list[float | int] | None = None
    label_std: list[float | int] | None = None
    head_hidden_sizes: list[int] | None = None
    classifier_dropout: float | int = 0.2
    problem_type: Literal["regression", "single_label_classification", "multi_label_classification"] = "regression"
    initializer_range: float = 0.02

    def __post_init__(self, **kwargs):
        if self.head_hidden_sizes is None:
            self.head_hidden_sizes = [256, 64]
        if self.id2label is None:
            kwargs.setdefault("num_labels", 1)
        super().__post_init__(**kwargs)

    def to_diff_dict(self) -> dict[str, Any]:
        # The base class leaves two labels out, its default, and they would be read back as one, ours.
        return {**super().to_diff_dict(), "id2label": self.id2label, "label2id": self.label2id}

    def validate_modalities(self):
        """Part of `@strict`-powered validation: there is a modality, and its sizes fit together."""
        if self.vocab_size is None and self.num_numeric_features == 0 and self.image_size is None:
            raise ValueError(
                "The model has no modality: set at least one of `vocab_size`, `num_numeric_features` and `image_size`."
            )
        if self.num_numeric_features < 0:
            raise ValueError(f"`num_numeric_features` must be at least 0, got {self.num_numeric_features}.")
        sizes = {name: getattr(self, name) for name in ("hidden_size", "max_position_embeddings", "num_channels")}
        sizes |= {f"head_hidden_sizes[{index}]": size for index, size in enumerate(self.head_hidden_sizes or ())}
        if self.vocab_size is not None:
            sizes["vocab_size"] = self.vocab_size
        for name, size in sizes.items():
            if size < 1:
                raise ValueError(f"`{name}` must be at least 1, got {size}.")
        if self.position_embedding_type == "sinusoidal" and self.hidden_size % 2:
            raise ValueError(f"Sinusoidal positions need an even `hidden_size`, got {self.hidden_size}.")
        if self.image_size is not None:
            sides = (self.image_size,) * 2 if isinstance(self.image_size, int) else self.image_size
            if self.patch_size < 1 or len(sides) != 2 or any(s < 1 or s % self.patch_size for s in sides):
                raise ValueError(
                    f"`image_size` must be a multiple of `patch_size` = {self.patch_size}, or two (height, width), got "
                    f"{self.image_size}."
                )
        if not math.isfinite(self.position_bias):
            raise ValueError(f"`position_bias` must be finite, got {self.position_bias}.")
        if not 0 <= self.initializer_range < math.inf:
            raise ValueError(f"`initializer_range` must be finite and at least 0, got {self.initializer_range}.")
        if not 0 <= self.classifier_dropout < 1:
            raise ValueError(f"`classifier_dropout` must be in [0, 1), got {self.classifier_dropout}.")

    def validate_statistics(self):
        """Part of `@strict`-powered validation: means and standard deviations come together, one for each number."""
        for kind, count_name, count in (
            ("numeric", "num_numeric_features", self.num_numeric_features),
            ("label", "num_labels", self.num_labels),
        ):
            mean, std = getattr(self, f"{kind}_mean"), getattr(self, f"{kind}_std")
            if mean is None and std is None:
                continue
            if mean is None or std is None or not len(mean) == len(std) == count:
                raise ValueError(
                    f"`{kind}_mean` and `{kind}_std` go together and must have `{count_name}` = {count} entries each, "
                    f"got {mean} and {std}."
                )
            if not all(math.isfinite(value) for value in mean) or not all(0 < value < math.inf for value in std):
                raise ValueError(
                    f"`{kind}_mean` must be finite and `{kind}_std` finite and above 0 (1 for a constant), got {mean} "
                    f"and {std}."
                )
        if self.label_mean is not None and self.problem_type != "regression":
            raise ValueError(
                f"`label_mean` and `label_std` are for `problem_type='regression'`, got {self.problem_type!r}."
            )
