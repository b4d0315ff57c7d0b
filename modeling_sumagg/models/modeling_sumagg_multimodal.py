"""The multimodal summation aggregation model: text, numbers and images summed into one latent vector.

P. Ekin, "Summation-Based Transformers: A Path Toward Linear Complexity Sequence Modeling", TechRxiv 2025,
doi 10.36227/techrxiv.175790522.25734653.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import SequenceClassifierOutput
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple

from ..common.checks import (
    is_concrete,
    labels_of_rows,
    look_up,
    loss_of_classes,
    refuse_sequence_parallelism,
)
from ..configuration.configuration_sumagg_multimodal import SumAggMultimodalConfig
from .position_modulation import PositionModulation, modulate


def exact_dtype(device: torch.device) -> torch.dtype:
    """The dtype to standardise in: float32 does not tell times in seconds apart, and Apple's devices have no float64."""
    return torch.float32 if device.type == "mps" else torch.float64


def sum_given(terms: torch.Tensor, given: torch.Tensor) -> torch.Tensor:
    """Sum over the terms given, `[B, N, d]` with `given` `[B, N]` to `[B, d]`, accumulated in float32."""
    dtype = torch.promote_types(terms.dtype, torch.float32)
    return terms.masked_fill(~given[..., None], 0).sum(dim=1, dtype=dtype).to(terms.dtype)


class SumAggSequenceSum(nn.Module):
    """`relu(Dense_d(sum_t relu(W h_t)))` over the terms given, tokens or patches; zero where none is."""

    def __init__(self, config: SumAggMultimodalConfig):
        super().__init__()
        self.proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, hidden_states: torch.Tensor, given: torch.Tensor) -> torch.Tensor:
        summed = self.dense(sum_given(self.proj(hidden_states).relu(), given)).relu()
        return summed.masked_fill(~given.any(dim=1, keepdim=True), 0)


class SumAggTextBranch(nn.Module):
    """The text, from `E[x_t]` `[B, T, d]` to `[B, d]`: the sum over `h_t = E[x_t] * (P_t + b)`."""

    def __init__(self, config: SumAggMultimodalConfig):
        super().__init__()
        self.modulation = PositionModulation(
            config.hidden_size, config.position_embedding_type, config.max_position_embeddings, config.position_bias
        )
        self.sequence_sum = SumAggSequenceSum(config)

    def forward(self, inputs_embeds: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
        if inputs_embeds.dim() != 3:
            raise ValueError(
                "`input_ids` must have the shape [B, T], `inputs_embeds` [B, T, d], got embeddings of the shape "
                f"{list(inputs_embeds.shape)}."
            )
        shape = inputs_embeds.shape[:2]
        if attention_mask is None:
            attention_mask = inputs_embeds.new_ones(shape, dtype=torch.bool)
        elif attention_mask.shape != shape:
            raise ValueError(
                f"`attention_mask` must have the shape [B, T] = {list(shape)} of the tokens, got "
                f"{list(attention_mask.shape)}."
            )
        given = attention_mask.to(inputs_embeds.device, torch.bool)
        position_ids = (given.long().cumsum(dim=1) - 1).clamp(min=0)
        return self.sequence_sum(self.modulation(inputs_embeds, position_ids), given)


class SumAggFeatureDense(nn.Module):
    """A dense layer of its own for each feature, `relu(W_f x_f + b_f)`: `[B, F, in]` to `[B, F, out]`."""

    def __init__(self, num_features: int, in_features: int, out_features: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_features, in_features, out_features))
        self.bias = nn.Parameter(torch.empty(num_features, out_features))

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        hidden_states = hidden_states.to(self.weight.dtype)
        return (torch.einsum("bfi,fio->bfo", hidden_states, self.weight) + self.bias).relu()


class SumAggNumericBranch(nn.Module):
    """
    The numbers, `[B, F]` to `[B, d]`: two dense layers of its own for each feature, the sum over the features given,
    two more dense layers; zero where no feature is given.
    """

    def __init__(self, config: SumAggMultimodalConfig):
        super().__init__()
        self.mean, self.std = config.numeric_mean, config.numeric_std
        self.num_features = config.num_numeric_features
        self.feature_dense1 = SumAggFeatureDense(self.num_features, 1, config.hidden_size)
        self.feature_dense2 = SumAggFeatureDense(self.num_features, config.hidden_size, config.hidden_size)
        self.dense1 = nn.Linear(config.hidden_size, config.hidden_size)
        self.dense2 = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, numeric_features: torch.Tensor) -> torch.Tensor:
        if numeric_features.dim() != 2 or numeric_features.shape[1] != self.num_features:
            raise ValueError(
                f"`numeric_features` must have the shape [B, F] with F = {self.num_features} "
                f"(`config.num_numeric_features`), got {list(numeric_features.shape)}."
            )
        if not numeric_features.is_floating_point():
            raise TypeError(f"`numeric_features` must be of a floating dtype, got {numeric_features.dtype}.")
        if is_concrete(numeric_features) and numeric_features.isinf().any():
            raise ValueError("`numeric_features` must be finite, or NaN where a feature is not given, got infinity.")

        given = ~numeric_features.isnan()
        # Before any weight, since the gradient of NaN times a weight is NaN.
        features = numeric_features.masked_fill(~given, 0)
        if self.mean is not None:
            features = features.to(exact_dtype(features.device))
            features = (features - features.new_tensor(self.mean)) / features.new_tensor(self.std)
        hidden_states = self.feature_dense2(self.feature_dense1(features[..., None]))
        summed = self.dense2(self.dense1(sum_given(hidden_states, given)).relu()).relu()
        return summed.masked_fill(~given.any(dim=1, keepdim=True), 0)


class SumAggImageBranch(nn.Module):
    """The image, `[B, channels, height, width]` to `[B, d]`: the sum over its patches, `h_n = patch_n * (P_n + b)`."""

    def __init__(self, config: SumAggMultimodalConfig):
        super().__init__()
        self.patch_size = config.patch_size
        self.position_bias = config.position_bias
        height, width = (config.image_size,) * 2 if isinstance(config.image_size, int) else config.image_size
        self.image_shape = (config.num_channels, height, width)
        self.patch_embeddings = nn.Conv2d(
            config.num_channels, config.hidden_size, kernel_size=config.patch_size, stride=config.patch_size
        )
        self.num_patches = (height // config.patch_size) * (width // config.patch_size)
        self.position_embeddings = nn.Embedding(self.num_patches, config.hidden_size)
        self.sequence_sum = SumAggSequenceSum(config)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        if pixel_values.dim() != 4 or pixel_values.shape[1:] != self.image_shape:
            raise ValueError(
                f"`pixel_values` must have the shape [B, channels, height, width] = [B, "
                f"{', '.join(map(str, self.image_shape))}], got {list(pixel_values.shape)}."
            )
        missing = pixel_values.isnan()
        patch_missing = F.max_pool2d(missing.any(dim=1, keepdim=True).float(), self.patch_size).flatten(1).bool()
        # Of the whole batch, as adapters of some rows see no others.
        position_ids = torch.arange(self.num_patches, device=pixel_values.device).expand(pixel_values.shape[0], -1)
        positions = self.position_embeddings(position_ids)
        patches = self.patch_embeddings(pixel_values.masked_fill(missing, 0).to(positions))
        patches = modulate(patches.flatten(2).transpose(1, 2), positions, self.position_bias)
        return self.sequence_sum(patches, ~patch_missing)


class SumAggMultimodalPreTrainedModel(PreTrainedModel):
    config: SumAggMultimodalConfig
    input_modalities = ("text", "image")
    _no_split_modules = ["SumAggTextBranch", "SumAggNumericBranch", "SumAggImageBranch"]
    _can_compile_fullgraph = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        # Glorot's bounds: without residuals and norms, narrower weights would shrink what every further layer sees.
        if isinstance(module, nn.Linear | nn.Conv2d):
            init.xavier_uniform_(module.weight)
        elif isinstance(module, SumAggFeatureDense):
            bound = math.sqrt(6 / (module.weight.shape[1] + module.weight.shape[2]))
            init.uniform_(module.weight, -bound, bound)
            init.zeros_(module.bias)


class SumAggForMultimodalRegression(SumAggMultimodalPreTrainedModel):
    """
    Regression (or, by `config.problem_type`, classification) from text, numbers and images. Each modality becomes a
    vector of width d; the vectors are added into one latent `z`, and the output is `Dense(dropout(relu(Dense_64(relu(
    Dense_256(z))))))`. A modality that is not given adds nothing to `z`, for a whole batch or for some of its rows.
    """

    # The mean squared error is a mean over the batch: `Trainer` has to divide by the accumulation steps.
    accepts_loss_kwargs = False

    def __init__(self, config: SumAggMultimodalConfig):
        # `from_pretrained(..., patch_size=...)` sets attributes of a config that was valid before.
        config.validate_all_numbers()
        config.validate_modalities()
        config.validate_statistics()
        super().__init__(config)
        self.num_labels = config.num_labels
        self.loss_type = "ForSequenceClassification"
        if config.vocab_size is not None:
            self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
            self.text_branch = SumAggTextBranch(config)
        if config.num_numeric_features > 0:
            self.numeric_branch = SumAggNumericBranch(config)
        if config.image_size is not None:
            self.image_branch = SumAggImageBranch(config)
        sizes = [config.hidden_size, *config.head_hidden_sizes]
        self.head = nn.ModuleList([nn.Linear(a, b) for a, b in zip(sizes[:-1], sizes[1:], strict=True)])
        self.dropout = nn.Dropout(config.classifier_dropout)
        self.score = nn.Linear(sizes[-1], config.num_labels)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        numeric_features: torch.FloatTensor | None = None,
        pixel_values: torch.FloatTensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> SequenceClassifierOutput:
        r"""
        Any of the modalities may be left out; a row with nothing at all gets the prediction of a zero latent.

        Args:
            input_ids (`torch.LongTensor` of shape `[B, T]`, *optional*): token ids.
            attention_mask (`torch.Tensor` of shape `[B, T]`, *optional*): 1 for real tokens, 0 for padding, which may
                stand anywhere. A row of zeros has no text. Without a mask every token is real, whatever its id.
            numeric_features (`torch.Tensor` of shape `[B, F]`, floating, *optional*): the numbers. Where the config has
                `numeric_mean` and `numeric_std` they are in their own units: pass float64, which does not round large
                ones. Otherwise the caller standardises them. NaN: this feature is not given. A row of NaN has no
                numbers.
            pixel_values (`torch.FloatTensor` of shape `[B, channels, height, width]`, *optional*): the images, as an
                image processor makes them. A patch with a NaN in it is not given; an image of NaN is no image.
            inputs_embeds (`torch.FloatTensor` of shape `[B, T, d]`, *optional*): embeddings, before modulation,
                instead of `input_ids`.
            labels (`torch.Tensor`, *optional*): targets `[B, num_labels]`, or `[B]` for one label, in the units of the
                predictions; class indices `[B]` for single-label classification; 0.0 and 1.0 `[B, num_labels]` for
                several labels.

        Returns:
            [`~transformers.modeling_outputs.SequenceClassifierOutput`]: `logits` `[B, num_labels]`, the predictions, at
                least float32. Where the config has `label_mean` and `label_std` they are float64 (on Apple's devices
                float32) in the labels' own units, and `loss` is the mean squared error in units of the labels' variance.

        Raises:
            `TypeError`: `numeric_features` of an integer dtype.
            `ValueError`: no modality is given, or one that this model does not have; both `input_ids` and
                `inputs_embeds`; an id outside the vocabulary; more tokens than positions; an infinite number; a label
                that is NaN; a wrong shape or a class that does not exist; sequence parallelism.
        """
        refuse_sequence_parallelism()
        if input_ids is not None and inputs_embeds is not None:
            raise ValueError("Pass one of `input_ids` and `inputs_embeds`, not both.")
        modalities = (
            ("input_ids", input_ids, "vocab_size"),
            ("inputs_embeds", inputs_embeds, "vocab_size"),
            ("numeric_features", numeric_features, "num_numeric_features"),
            ("pixel_values", pixel_values, "image_size"),
        )
        given = [modality for modality in modalities if modality[1] is not None]
        if not given:
            raise ValueError(
                "No modality is given: pass at least one of `input_ids`, `numeric_features` and `pixel_values`."
            )
        first_name, first, _ = given[0]
        for name, value, size_name in given:
            size = getattr(self.config, size_name)
            if not size:
                raise ValueError(f"`{name}` is given, but the model was built without (`config.{size_name}`={size}).")
            if value.shape[0] != first.shape[0]:
                raise ValueError(
                    f"`{name}` has {value.shape[0]} rows and `{first_name}` {first.shape[0]}: fill what a row lacks, "
                    "numbers and images with NaN, texts with masked tokens."
                )

        latents = []
        if input_ids is not None:
            inputs_embeds = look_up(
                self.embed_tokens, input_ids, "input_ids", self.config.vocab_size, "the ids of the vocabulary"
            )
        if inputs_embeds is not None:
            latents.append(self.text_branch(inputs_embeds, attention_mask))
        if numeric_features is not None:
            latents.append(self.numeric_branch(numeric_features))
        if pixel_values is not None:
            latents.append(self.image_branch(pixel_values))
        # Branches may be on different devices, and the head is on that of the last one or a later one.
        hidden_states = sum(latent.to(latents[-1].device) for latent in latents)
        for dense in self.head:
            hidden_states = dense(hidden_states).relu()
        scores = self.score(self.dropout(hidden_states))
        scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
        logits = scores
        if self.config.label_mean is not None:
            exact = scores.to(exact_dtype(scores.device))
            mean, std = exact.new_tensor(self.config.label_mean), exact.new_tensor(self.config.label_std)
            logits = exact * std + mean
        loss = None
        if labels is not None:
            targets = labels_of_rows(labels, scores, self.config)
            if is_concrete(targets) and targets.isnan().any():
                raise ValueError("`labels` must be numbers, got NaN: leave out rows without a label.")
            if self.config.label_mean is not None:
                # Of the labels as they were given: large ones may be equal in the dtype of the scores.
                targets = ((labels.to(mean) - mean) / std).to(scores)
            arguments = {"pooled_logits": scores, "config": self.config, **kwargs}
            loss = loss_of_classes(self.loss_function, targets, self.num_labels, **arguments)
        return SequenceClassifierOutput(loss=loss, logits=logits)


__all__ = ["SumAggForMultimodalRegression", "SumAggMultimodalPreTrainedModel"]
