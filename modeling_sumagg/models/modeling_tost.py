"""The Token Statistics Transformer (ToST) for images: "Token Statistics Transformer: Linear-Time Attention via
Variational Rate Reduction", Wu et al., ICLR 2025, arXiv 2412.17810."""

import itertools
import math
from collections import OrderedDict

import torch
from torch import nn
from transformers import BitImageProcessorPil
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.backbone_utils import BackboneMixin, filter_output_hidden_states
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import (
    BackboneOutput,
    BaseModelOutput,
    BaseModelOutputWithPooling,
    ImageClassifierOutput,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
from transformers.models.vit.modeling_vit import eager_attention_forward
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs
from transformers.utils.generic import can_return_tuple
from transformers.utils.output_capturing import capture_outputs

from ..common.checks import labels_of_rows, loss_of_classes
from ..configuration.configuration_tost import ToSTConfig
from ..ops.token_statistics.token_statistics import token_membership, token_statistics


def tost_image_processor(config: ToSTConfig) -> BitImageProcessorPil:
    """
    The published evaluation preprocessing, as an image processor of transformers set to `config.image_size`: shorter
    side resized to the input size, bicubic, centre crop, ImageNet mean and standard deviation. It needs no
    torchvision, and once saved `AutoImageProcessor.from_pretrained` loads it without this package.

    Only three-channel images have published statistics: for another `config.num_channels` the images are not converted
    to RGB and every channel takes the average of the three.
    """
    height, width = (config.image_size,) * 2 if isinstance(config.image_size, int) else config.image_size
    if config.num_channels == 3:
        statistics = {"image_mean": IMAGENET_DEFAULT_MEAN, "image_std": IMAGENET_DEFAULT_STD}
    else:
        statistics = {
            "image_mean": [sum(IMAGENET_DEFAULT_MEAN) / 3] * config.num_channels,
            "image_std": [sum(IMAGENET_DEFAULT_STD) / 3] * config.num_channels,
            "do_convert_rgb": False,
        }
    return BitImageProcessorPil(
        size={"shortest_edge": max(height, width)}, crop_size={"height": height, "width": width}, **statistics
    )


def fourier_position_code(height: int, width: int, device: torch.device | None = None) -> torch.Tensor:
    """
    The position code of a grid of patches, [1, 64, height, width] in float32: 32 channels for the row, then 32 for the
    column. With x the row or column number counted from 1 and divided by (last + 1e-6), channel i of the 32 is the
    sine (i even) or cosine (i odd) of 2π x / 10000^(2⌊i/2⌋/32).
    """
    hidden_size = 32
    frequency = 10000 ** (-2 * torch.arange(hidden_size // 2, dtype=torch.float32, device=device) / hidden_size)

    def axis_code(length: int) -> torch.Tensor:
        position = torch.arange(1, length + 1, dtype=torch.float32, device=device) / (length + 1e-6) * 2 * math.pi
        angle = position[:, None] * frequency
        return torch.stack((angle.sin(), angle.cos()), dim=-1).flatten(1)

    rows = axis_code(height)[:, None].expand(-1, width, -1)
    columns = axis_code(width)[None].expand(height, -1, -1)
    return torch.cat((rows, columns), dim=-1).permute(2, 0, 1)[None]


class ToSTInputConvolution(nn.Conv2d):
    """A convolution that takes any dtype: it works in that of its weight."""

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return super().forward(features.to(self.weight.dtype))


class ToSTPatchEmbeddings(nn.Module):
    """
    Turns `pixel_values` of shape `(batch_size, num_channels, height, width)` into patches of shape `(batch_size,
    hidden_size, height / patch_size, width / patch_size)` by stride-2 convolutions with batch norm, which double the
    channels up to `hidden_size`.
    """

    def __init__(self, config: ToSTConfig):
        super().__init__()
        self.num_channels = config.num_channels
        self.patch_size = config.patch_size
        num_stages = int(math.log2(config.patch_size))
        widths = [config.num_channels] + [config.hidden_size >> stage for stage in reversed(range(num_stages))]
        stages: list[nn.Module] = []
        for in_channels, out_channels in itertools.pairwise(widths):
            convolution_class = nn.Conv2d if stages else ToSTInputConvolution
            convolution = convolution_class(in_channels, out_channels, kernel_size=3, stride=2, padding=1, bias=False)
            stage = OrderedDict(convolution=convolution, normalization=nn.BatchNorm2d(out_channels))
            stages += [nn.Sequential(stage), ACT2FN[config.hidden_act]]
        # No activation after the last stage.
        self.projection = nn.Sequential(*stages[:-1])

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        if pixel_values.dim() != 4:
            raise ValueError(
                "`pixel_values` must have the shape [B, channels, height, width], got "
                f"{list(pixel_values.shape)}: a single image is a batch of one, `pixel_values[None]`."
            )
        _, num_channels, height, width = pixel_values.shape
        if num_channels != self.num_channels:
            raise ValueError(
                f"The images have {num_channels} channels, the model takes {self.num_channels} (config.num_channels): "
                "convert the images or build the model with another num_channels."
            )
        if height % self.patch_size or width % self.patch_size:
            raise ValueError(
                f"The images are {height} x {width} (height x width), which patches of {self.patch_size} x "
                f"{self.patch_size} do not cover: resize, crop or pad both sides to multiples of {self.patch_size}."
            )
        # With the channels last the convolutions are faster, and a patch ends up as one piece of memory.
        patches = pixel_values.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
        for module in self.projection:
            # An activation is faster on a tensor that is contiguous as it is indexed.
            is_stage = isinstance(module, nn.Sequential)
            patches = module(patches) if is_stage else module(patches.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return patches


class ToSTPositionEmbeddings(nn.Module):
    """Adds to patches `(batch_size, hidden_size, height, width)` a projection of the Fourier code of row and column."""

    def __init__(self, config: ToSTConfig):
        super().__init__()
        self.projection = ToSTInputConvolution(64, config.hidden_size, kernel_size=1)

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        height, width = patches.shape[-2:]
        # Of the whole batch, as adapters of some rows see no others.
        code = fourier_position_code(height, width, patches.device).expand(patches.shape[0], -1, -1, -1)
        return patches + self.projection(code)


class ToSTEmbeddings(nn.Module):
    """Patches with their positions added, `(batch_size, num_patches, hidden_size)`, row after row."""

    def __init__(self, config: ToSTConfig):
        super().__init__()
        self.patch_embeddings = ToSTPatchEmbeddings(config)
        self.position_embeddings = ToSTPositionEmbeddings(config)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        patches = self.position_embeddings(self.patch_embeddings(pixel_values))
        # Else a transposed view would hand its layout on to every residual sum, and each norm would copy it.
        return self.dropout(patches.flatten(2).transpose(1, 2).contiguous())


class ToSTAttention(nn.Module):
    """Token statistics self-attention (TSSA): one projection w = U x, its second moments, and no pairwise product."""

    def __init__(self, config: ToSTConfig):
        super().__init__()
        self.config = config
        self.head_shape = (config.num_attention_heads, config.hidden_size // config.num_attention_heads)
        self.w_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=config.qkv_bias)
        self.temperature = nn.Parameter(torch.ones(config.num_attention_heads, 1))
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(
        self, hidden_states: torch.Tensor, **kwargs: Unpack[TransformersKwargs]
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        w = self.w_proj(hidden_states).unflatten(-1, self.head_shape).transpose(1, 2)
        dropout_p = self.config.attention_probs_dropout_prob if self.training else 0.0
        output = token_statistics(w, self.temperature, dropout_p=dropout_p)
        output = output.transpose(1, 2).flatten(2)
        # Kept out of the operator, whose training path stores neither Π nor the squares.
        output_attentions = kwargs.get("output_attentions", self.config.output_attentions)
        membership = token_membership(w, self.temperature) if output_attentions else None
        return self.dropout(self.o_proj(output)), membership


class ToSTClassAttention(nn.Module):
    """Softmax attention of the class token over all tokens, itself included; returns the new class token alone."""

    def __init__(self, config: ToSTConfig):
        super().__init__()
        self.config = config
        self.head_shape = (config.num_attention_heads, config.hidden_size // config.num_attention_heads)
        self.is_causal = False
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size, bias=config.qkv_bias)
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        qkv = self.qkv(hidden_states).unflatten(-1, (3, *self.head_shape))
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind()
        interface = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        class_token, _ = interface(
            self,
            query[:, :, :1],
            key,
            value,
            attention_mask=None,
            dropout=self.config.attention_probs_dropout_prob if self.training else 0.0,
            scaling=self.head_shape[1] ** -0.5,
        )
        return self.dropout(self.o_proj(class_token.reshape_as(hidden_states[:, :1])))


class ToSTMLP(nn.Module):
    def __init__(self, config: ToSTConfig):
        super().__init__()
        intermediate_size = round(config.hidden_size * config.mlp_ratio)
        self.fc1 = nn.Linear(config.hidden_size, intermediate_size)
        self.activation_fn = ACT2FN[config.hidden_act]
        self.fc2 = nn.Linear(intermediate_size, config.hidden_size)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        hidden_states = self.dropout(self.activation_fn(self.fc1(hidden_states)))
        return self.dropout(self.fc2(hidden_states))


class ToSTLayerScale(nn.Module):
    """
    Adds a residual branch with a learned scale γ; in training the branch is dropped for whole images (stochastic depth).
    """

    def __init__(self, config: ToSTConfig, drop_path_rate: float = 0.0):
        super().__init__()
        self.scale = nn.Parameter(torch.full((config.hidden_size,), float(config.layerscale_value)))
        self.drop_path_rate = drop_path_rate

    def forward(self, hidden_states: torch.Tensor, branch: torch.Tensor) -> torch.Tensor:
        scale = self.scale
        if self.training and self.drop_path_rate > 0:
            keep = nn.functional.dropout(branch.new_ones(branch.shape[0], 1, 1), p=self.drop_path_rate)
            scale = scale * keep
        return torch.addcmul(hidden_states, scale, branch)


class ToSTLayer(GradientCheckpointingLayer):
    def __init__(self, config: ToSTConfig):
        super().__init__()
        self.norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.attention = ToSTAttention(config)
        self.layer_scale1 = ToSTLayerScale(config, config.drop_path_rate)
        self.norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = ToSTMLP(config)
        self.layer_scale2 = ToSTLayerScale(config, config.drop_path_rate)

    def forward(self, hidden_states: torch.Tensor, **kwargs: Unpack[TransformersKwargs]) -> torch.Tensor:
        attention_output, _ = self.attention(self.norm1(hidden_states), **kwargs)
        hidden_states = self.layer_scale1(hidden_states, attention_output)
        return self.layer_scale2(hidden_states, self.mlp(self.norm2(hidden_states)))


class ToSTClassAttentionLayer(GradientCheckpointingLayer):
    def __init__(self, config: ToSTConfig):
        super().__init__()
        self.norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.attention = ToSTClassAttention(config)
        self.layer_scale1 = ToSTLayerScale(config)
        self.norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = ToSTMLP(config)
        self.layer_scale2 = ToSTLayerScale(config)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        normalized = self.norm1(hidden_states)
        branch = torch.cat((self.attention(normalized), normalized[:, 1:]), dim=1)
        hidden_states = self.norm2(self.layer_scale1(hidden_states, branch))
        class_token, patches = hidden_states[:, :1], hidden_states[:, 1:]
        # In the original the second residual is over all tokens and its branch passes the patches through: doubled.
        return torch.cat((self.layer_scale2(class_token, self.mlp(class_token)), 2 * patches), dim=1)


class ToSTPreTrainedModel(PreTrainedModel):
    config: ToSTConfig
    base_model_prefix = "tost"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    supports_gradient_checkpointing = True
    _no_split_modules = ["ToSTEmbeddings", "ToSTLayer", "ToSTClassAttentionLayer"]
    _supports_sdpa = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {"hidden_states": ToSTLayer, "attentions": ToSTAttention}
    _input_embed_layer = "patch_embeddings"

    def __init__(self, config: ToSTConfig):
        # `from_pretrained(..., patch_size=...)` sets attributes of a config that was valid before.
        config.validate_all_numbers()
        config.validate_architecture()
        super().__init__(config)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, nn.Linear):
            init.trunc_normal_(module.weight, std=self.config.initializer_range)
        elif isinstance(module, nn.Conv2d):
            # The original leaves its convolutions at torch's default.
            module.reset_parameters()
        elif isinstance(module, ToSTAttention):
            init.ones_(module.temperature)
        elif isinstance(module, ToSTLayerScale):
            init.constant_(module.scale, self.config.layerscale_value)
        elif isinstance(module, ToSTModel):
            init.trunc_normal_(module.cls_token, std=self.config.initializer_range)


class ToSTEncoder(ToSTPreTrainedModel):
    """The token statistics blocks."""

    # The membership is a softmax over the heads: every process computes all of them, from sharded projections.
    _tp_plan = {
        "layers.*.attention.w_proj": "colwise_gather_output",
        "layers.*.attention.o_proj": "rowwise_split_input",
        "layers.*.mlp.fc1": "colwise",
        "layers.*.mlp.fc2": "rowwise",
    }

    def __init__(self, config: ToSTConfig):
        super().__init__(config)
        self.layers = nn.ModuleList([ToSTLayer(config) for _ in range(config.num_hidden_layers)])
        self.post_init()

    @capture_outputs(tie_last_hidden_states=False)
    def forward(self, hidden_states: torch.Tensor, **kwargs: Unpack[TransformersKwargs]) -> BaseModelOutput:
        for layer in self.layers:
            hidden_states = layer(hidden_states, **kwargs)
        return BaseModelOutput(last_hidden_state=hidden_states)


class ToSTModel(ToSTPreTrainedModel):
    """ToST vision model: convolutional patches, token statistics blocks, then class attention."""

    # q, k and v are one map, whose shards would not be whole heads.
    _tp_plan = {
        "class_attention_layers.*.attention.qkv": "colwise_gather_output",
        "class_attention_layers.*.attention.o_proj": "rowwise_split_input",
        "class_attention_layers.*.mlp.fc1": "colwise",
        "class_attention_layers.*.mlp.fc2": "rowwise",
    }

    def __init__(self, config: ToSTConfig):
        super().__init__(config)
        self.embeddings = ToSTEmbeddings(config)
        self.encoder = ToSTEncoder(config)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.hidden_size))
        self.class_attention_layers = nn.ModuleList(
            [ToSTClassAttentionLayer(config) for _ in range(config.num_class_attention_layers)]
        )
        self.layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.post_init()

    @can_return_tuple
    def forward(self, pixel_values: torch.Tensor, **kwargs: Unpack[TransformersKwargs]) -> BaseModelOutputWithPooling:
        r"""
        Args:
            pixel_values (`torch.Tensor` of shape `(batch_size, num_channels, height, width)`):
                Images of any size whose sides are multiples of `config.patch_size`.
            output_attentions (`bool`, *optional*):
                Whether to return the memberships Π, see below.
            output_hidden_states (`bool`, *optional*):
                Whether to return the patches as they enter the first token statistics block and leave every one.

        Returns:
            [`~transformers.modeling_outputs.BaseModelOutputWithPooling`] with N = height / patch_size × width /
            patch_size patches in rows:
            - **last_hidden_state** `(batch_size, 1 + N, hidden_size)`: class token, then patches, after class
              attention and the final layer norm.
            - **pooler_output** `(batch_size, hidden_size)`: the class token.
            - **hidden_states**: `num_hidden_layers + 1` tensors `(batch_size, N, hidden_size)`. There is no class token
              yet, and class attention adds none.
            - **attentions**: one tensor `(batch_size, num_attention_heads, N)` in float32 a token statistics block: Π,
              the soft membership of each patch in each head, which sums to 1 over the heads. There are no pairwise
              weights in token statistics, and the softmax weights of class attention are not among these.

        Raises:
            ValueError: `pixel_values` of another number of dimensions, of other channels than `config.num_channels`,
                or with sides that `config.patch_size` does not divide.
        """
        encoder_outputs = self.encoder(self.embeddings(pixel_values), **kwargs)
        patches = encoder_outputs.last_hidden_state
        # The encoder may be on other devices than the parameter.
        class_token = self.cls_token.to(patches).expand(patches.shape[0], -1, -1)
        hidden_states = torch.cat((class_token, patches), dim=1)
        for layer in self.class_attention_layers:
            hidden_states = layer(hidden_states)
        hidden_states = self.layernorm(hidden_states)
        return BaseModelOutputWithPooling(
            last_hidden_state=hidden_states,
            pooler_output=hidden_states[:, 0],
            hidden_states=encoder_outputs.hidden_states,
            attentions=encoder_outputs.attentions,
        )


class ToSTForImageClassification(ToSTPreTrainedModel):
    """ToST with a linear head on the class token."""

    # The loss is a mean over the batch: `Trainer` has to divide by the accumulation steps.
    accepts_loss_kwargs = False

    def __init__(self, config: ToSTConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.tost = ToSTModel(config)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor,
        labels: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> ImageClassifierOutput:
        r"""
        Args:
            pixel_values (`torch.Tensor` of shape `(batch_size, num_channels, height, width)`):
                Images of any size whose sides are multiples of `config.patch_size`.
            labels (`torch.Tensor` of shape `(batch_size,)` or `(batch_size, num_labels)`, *optional*):
                Class indices (cross entropy), several labels an image as 0 and 1 (binary cross entropy), or values
                (mean square), as `config.problem_type` says; where it is not set, `config.num_labels` and the shape
                of the labels decide.

        Returns:
            [`~transformers.modeling_outputs.ImageClassifierOutput`] with `logits` `(batch_size, num_labels)`;
            `hidden_states` and `attentions` are those of [`ToSTModel`].

        Raises:
            ValueError: as [`ToSTModel`]; labels of another shape, or of a class that does not exist.
        """
        outputs = self.tost(pixel_values, **kwargs)
        logits = self.classifier(outputs.pooler_output)
        loss = None
        if labels is not None:
            # In half precision a squared error above 256 would be infinite.
            scores = logits.to(torch.promote_types(logits.dtype, torch.float32))
            labels = labels_of_rows(labels, scores, self.config)
            arguments = {"pooled_logits": scores, "config": self.config, **kwargs}
            loss = loss_of_classes(self.loss_function, labels, self.num_labels, **arguments)
        return ImageClassifierOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


class ToSTBackbone(BackboneMixin, ToSTPreTrainedModel):
    """The patches and the token statistics blocks of ToST as a backbone: no class token, no class attention."""

    _keys_to_ignore_on_load_unexpected = [r"cls_token", r"class_attention_layers", r"layernorm", r"classifier"]

    def __init__(self, config: ToSTConfig):
        super().__init__(config)
        self.num_features = [config.hidden_size] * (config.num_hidden_layers + 1)
        self.embeddings = ToSTEmbeddings(config)
        self.encoder = ToSTEncoder(config)
        self.post_init()

    @can_return_tuple
    @filter_output_hidden_states
    def forward(self, pixel_values: torch.Tensor, **kwargs: Unpack[TransformersKwargs]) -> BackboneOutput:
        r"""
        Args:
            pixel_values (`torch.Tensor` of shape `(batch_size, num_channels, height, width)`):
                Images of any size whose sides are multiples of `config.patch_size`.

        Returns:
            [`~transformers.modeling_outputs.BackboneOutput`] with one feature map `(batch_size, hidden_size, height /
            patch_size, width / patch_size)` for each of `config.out_features`: the residual stream as it leaves that
            block, not normalised.
        """
        outputs = self.encoder(self.embeddings(pixel_values), **kwargs)
        grid = [side // self.config.patch_size for side in pixel_values.shape[-2:]]
        feature_maps = tuple(
            outputs.hidden_states[index].transpose(1, 2).unflatten(2, grid) for index in self.out_indices
        )
        return BackboneOutput(
            feature_maps=feature_maps, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


__all__ = [
    "ToSTBackbone",
    "ToSTForImageClassification",
    "ToSTModel",
    "ToSTPreTrainedModel",
    "tost_image_processor",
]
