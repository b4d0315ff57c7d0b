"""Configuration of the Token Statistics Transformer (ToST), "Token Statistics Transformer: Linear-Time Attention via
Variational Rate Reduction", Wu et al., ICLR 2025, arXiv 2412.17810."""

import math

from huggingface_hub.dataclasses import strict
from transformers.activations import ACT2FN
from transformers.backbone_utils import BackboneConfigMixin
from transformers.configuration_utils import PreTrainedConfig

from .configuration_fields import NamedFields


@strict
class ToSTConfig(NamedFields, BackboneConfigMixin, PreTrainedConfig):
    r"""
    Configuration of a ToST vision model: [`ToSTModel`], [`ToSTForImageClassification`], [`ToSTBackbone`]. The defaults
    are the published small-12 model at patch size 16. All published sizes are in `configuration/presets`.

    Args:
        hidden_size (`int`, *optional*, defaults to 384):
            Width d of the patch tokens. The convolutional stem halves it once per earlier stage, so it must be a
            multiple of 8 at patch 16 and of 4 at patch 8, as well as of `num_attention_heads`.
        num_hidden_layers (`int`, *optional*, defaults to 12):
            Number of token statistics blocks.
        num_attention_heads (`int`, *optional*, defaults to 8):
            Number K of heads: the subspaces among which each patch distributes its membership Π.
        num_class_attention_layers (`int`, *optional*, defaults to 2):
            Number of class-attention blocks after the token statistics blocks.
        mlp_ratio (`float`, *optional*, defaults to 4.0):
            Width of the feed-forward layers, relative to `hidden_size`.
        hidden_act (`str`, *optional*, defaults to `"gelu"`):
            Activation of the stem and of the feed-forward layers.
        hidden_dropout_prob (`float`, *optional*, defaults to 0.0):
            Dropout after the position code, the output projections and both feed-forward maps.
        attention_probs_dropout_prob (`float`, *optional*, defaults to 0.0):
            Dropout of the entries of 1/(1 + m) in token statistics and of the softmax weights in class attention.
        drop_path_rate (`float`, *optional*, defaults to 0.0):
            Probability of dropping a residual branch for a whole image in training (stochastic depth), the same in
            every token statistics block, as in the original; class-attention blocks are never dropped.
        layerscale_value (`float`, *optional*, defaults to 1.0):
            Initial layer scale γ. Published: 1.0 at depth 12, 1e-5 at depth 24.
        initializer_range (`float`, *optional*, defaults to 0.02):
            Standard deviation of the truncated normal that initialises the linear maps and the class token.
        layer_norm_eps (`float`, *optional*, defaults to 1e-6):
            Epsilon of every layer norm.
        image_size (`int` or pair of `int` (height, width), *optional*, defaults to 224):
            Size of the images that the image processor makes. The model itself takes every size that `patch_size`
            divides, because its positions are computed.
        patch_size (`int`, *optional*, defaults to 16):
            16 (four stride-2 convolutions) or 8 (three).
        num_channels (`int`, *optional*, defaults to 3):
            Number of channels of the images.
        qkv_bias (`bool`, *optional*, defaults to `True`):
            Whether the projection U of token statistics and the q, k, v projection of class attention have a bias.
        out_features (`list[str]`, *optional*):
            Feature maps that [`ToSTBackbone`] returns, among `"stem"`, `"stage1"`, ..., one stage for each block. Defaults
            to the last.
        out_indices (`list[int]`, *optional*):
            The same choice by index.

    Example:

    ```python
    >>> from modeling_sumagg import ToSTConfig, ToSTForImageClassification

    >>> config = ToSTConfig(hidden_size=192, num_attention_heads=4, num_labels=10)
    >>> model = ToSTForImageClassification(config)
    ```"""

    model_type = "tost"
    # `layers` are in the encoder, `class_attention_layers` in the model.
    base_model_fsdp_plan = {"layers.*": "free_full_weight", "class_attention_layers.*": "free_full_weight"}

    hidden_size: int = 384
    num_hidden_layers: int = 12
    num_attention_heads: int = 8
    num_class_attention_layers: int = 2
    mlp_ratio: float | int = 4.0
    hidden_act: str = "gelu"
    hidden_dropout_prob: float | int = 0.0
    attention_probs_dropout_prob: float | int = 0.0
    drop_path_rate: float | int = 0.0
    layerscale_value: float | int = 1.0
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-6
    image_size: int | list[int] | tuple[int, int] = 224
    patch_size: int = 16
    num_channels: int = 3
    qkv_bias: bool = True
    _out_features: list[str] | None = None
    _out_indices: list[int] | None = None

    def __post_init__(self, **kwargs):
        self.stage_names = ["stem"] + [f"stage{index}" for index in range(1, self.num_hidden_layers + 1)]
        self.set_output_features_output_indices(
            out_features=kwargs.pop("out_features", None), out_indices=kwargs.pop("out_indices", None)
        )
        super().__post_init__(**kwargs)

    def validate_architecture(self):
        """Part of `@strict`-powered validation: the sizes fit together, and probabilities are probabilities."""
        for name in ("hidden_size", "num_attention_heads", "num_channels"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")
        for name in ("num_hidden_layers", "num_class_attention_layers"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)}.")
        if round(self.hidden_size * self.mlp_ratio) < 1:
            raise ValueError(f"mlp_ratio must leave at least one channel of {self.hidden_size}, got {self.mlp_ratio}.")
        if self.hidden_act not in ACT2FN:
            raise ValueError(f"hidden_act must be one of {sorted(ACT2FN)}, got {self.hidden_act!r}.")
        if self.patch_size not in (8, 16):
            raise ValueError(
                f"patch_size must be 8 or 16 (three or four stride-2 convolutions), got {self.patch_size}."
            )
        unit = math.lcm(self.num_attention_heads, self.patch_size // 2)
        if self.hidden_size % unit:
            raise ValueError(
                f"hidden_size must be a multiple of {unit}, got {self.hidden_size}: num_attention_heads "
                f"{self.num_attention_heads} heads share it, and the stem of patch size {self.patch_size} starts with "
                f"hidden_size / {self.patch_size // 2} channels."
            )
        sides = (self.image_size,) * 2 if isinstance(self.image_size, int) else self.image_size
        if len(sides) != 2 or any(side < 1 or side % self.patch_size for side in sides):
            raise ValueError(
                f"image_size must be a multiple of patch_size {self.patch_size}, or two (height, width), "
                f"got {self.image_size}."
            )
        if self.layer_norm_eps <= 0:
            raise ValueError(f"layer_norm_eps must be above 0, got {self.layer_norm_eps}.")
        if self.initializer_range < 0:
            raise ValueError(f"initializer_range must be at least 0, got {self.initializer_range}.")
        for name in ("hidden_dropout_prob", "attention_probs_dropout_prob", "drop_path_rate"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} is the probability of dropping, in [0, 1), got {getattr(self, name)}.")


__all__ = ["ToSTConfig"]
