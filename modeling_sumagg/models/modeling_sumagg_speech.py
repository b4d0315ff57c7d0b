"""Summation aggregation models for speech: a causal front end and the blocks of the text models over its tokens.

P. Ekin, "Summation-Based Transformers: A Path Toward Linear Complexity Sequence Modeling", TechRxiv 2025,
doi 10.36227/techrxiv.175790522.25734653.
"""

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F
from transformers import Cache, DynamicCache, PreTrainedConfig
from transformers.activations import ACT2FN
from transformers.modeling_outputs import SequenceClassifierOutput
from transformers.models.wav2vec2.modeling_wav2vec2 import _compute_mask_indices
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple

from ..common.checks import check_labels, is_concrete, labels_of_rows, loss_of_classes
from ..common.compatibility import (
    BaseModelOutputWithPast,
    CausalLMOutputWithPast,
    accepts_cache,
    find_cache,
    named_cache,
)
from ..configuration.configuration_sumagg_speech import SumAggSpeechConfig
from ..decoder.cache import adopt_cache
from ..decoder.layout import SequenceLayout, sequence_layout
from ..decoder.masks import attention_masks
from ..decoder.recurrence import RecurrentLayer, recur
from ..ops.stacked_frames import stack_frames
from .modeling_sumagg import SumAggModel, SumAggPooler, SumAggPreTrainedModel


@dataclass
class SumAggSpeechModelOutput(BaseModelOutputWithPast):
    """`token_mask` `[B, T']` is 1 for the tokens that a row has, those that its frames have completed, and else 0."""

    token_mask: torch.Tensor | None = None


@dataclass
class SumAggCTCOutput(CausalLMOutputWithPast):
    """`token_mask` `[B, T']` is 1 for the logits of tokens that a row has, and else 0."""

    token_mask: torch.Tensor | None = None


class FramesLayer(RecurrentLayer):
    """The cache layer of a front end, the first of its cache, which counts frames where the others count tokens."""

    is_croppable = False

    def activate_past_recording(self) -> None:
        raise ValueError(
            "There is no going back over audio: go on from a copy of the cache (`copy.deepcopy`) instead."
        )


def adopt_cache_of_frames(cache: Cache, config: PreTrainedConfig) -> Cache:
    """
    Make `cache` fit a model with a front end, in place, as [`adopt_cache`] does for one without.

    An empty cache that lacks the layer of the front end, as `DynamicCache(config=config)` does, is given one.

    Args:
        cache (`transformers.Cache`): the cache passed to the model.
        config (`PreTrainedConfig`): the model's config, with `layer_types` of its blocks.

    Returns:
        `transformers.Cache`: the cache of the blocks, whose layers are those of `cache` but for the first.

    Raises:
        `ValueError`: the model can go on from no cache, or not from this one.
    """
    if not config.is_causal:
        raise ValueError("A bidirectional model has no decode state: pass no `cache`.")
    if "full_attention" in config.layer_types:
        raise ValueError(
            "A model of frames with full attention has no decode state, which would grow with them: choose "
            "'sliding_attention' in `layer_types`, or pass no `cache`."
        )
    layers = cache.layers
    if cache.layer_class_to_replicate is not None and not layers:
        layers = DynamicCache(config=config).layers
    if len(layers) == config.num_hidden_layers and not any(layer.is_initialized for layer in layers):
        layers = [FramesLayer(), *layers]
    if not layers or not isinstance(layers[0], FramesLayer):
        raise ValueError(
            "`cache` is not of this model: it begins with a "
            f"{type(layers[0]).__name__ if layers else None} and not with the layer of a front end. Make it with "
            "`DynamicCache(config=model.config)`, and fill it with this model only."
        )
    blocks = Cache(layers=layers[1:])
    adopt_cache(blocks, config)
    cache.layers, cache.layer_class_to_replicate = [layers[0], *blocks.layers], None
    return blocks


class SumAggFrontEnd(nn.Module):
    """
    Frames to tokens, `W_2 act(W_1 y_j + b_1) + b_2` of the windows `y_j` of a causal convolution with a stride
    ([`~modeling_sumagg.ops.stack_frames`]), of frames that are standardised by the statistics of the config.
    """

    def __init__(self, config: SumAggSpeechConfig):
        super().__init__()
        self.config = config
        self.frames_proj = nn.Linear(config.subsampling_kernel_size * config.num_mel_bins, config.hidden_size)
        self.act_fn = ACT2FN[config.hidden_act]
        self.token_proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(
        self, input_features: torch.Tensor, layout: SequenceLayout, cache: Cache | None, dtype: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Frames `[B, T, num_mel_bins]` to tokens `[B, N, d]` of the `dtype` and their numbers `[B, N]`, -1 where a row has
        no more.
        """
        config = self.config
        frames = self._standardised(input_features.to(torch.promote_types(input_features.dtype, torch.float32)))
        if self.training and config.apply_spec_augment:
            frames = self._masked(frames, layout.attention_mask)
        sizes = {"size": config.subsampling_kernel_size, "stride": config.subsampling_factor}
        windows, numbers = recur(stack_frames, frames, layout, cache, 0, **sizes)
        return self.token_proj(self.act_fn(self.frames_proj(windows.flatten(2).to(dtype)))), numbers

    def _standardised(self, frames: torch.Tensor) -> torch.Tensor:
        mean, std = self.config.feature_mean, self.config.feature_std
        return frames if mean is None else (frames - frames.new_tensor(mean)) / frames.new_tensor(std)

    def _masked(self, frames: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
        """SpecAugment, over the real frames of each row."""
        config, (batch_size, length, bins) = self.config, frames.shape
        if config.mask_time_prob > 0 and length >= config.mask_time_length:
            masked = _compute_mask_indices(
                (batch_size, length),
                config.mask_time_prob,
                config.mask_time_length,
                attention_mask,
                config.mask_time_min_masks,
            )
            masked = torch.from_numpy(masked).to(frames.device)
            if attention_mask is not None:
                # transformers counts as if padding stood on the right.
                masked = masked.gather(1, (attention_mask.long().cumsum(dim=1) - 1).clamp(min=0))
            frames = frames.masked_fill(masked[..., None], 0)
        if config.mask_feature_prob > 0:
            masked = _compute_mask_indices(
                (batch_size, bins),
                config.mask_feature_prob,
                config.mask_feature_length,
                min_masks=config.mask_feature_min_masks,
            )
            frames = frames.masked_fill(torch.from_numpy(masked).to(frames.device)[:, None], 0)
        return frames


class SumAggSpeechPreTrainedModel(SumAggPreTrainedModel):
    config: SumAggSpeechConfig
    main_input_name = "input_features"
    input_modalities = ("audio",)
    _input_embed_layer = "token_proj"

    @property
    def can_stream(self) -> bool:
        """Whether there is a decode state, from which audio can be gone on with."""
        return self.config.is_causal and "full_attention" not in self.config.layer_types

    def _get_feat_extract_output_lengths(
        self, input_lengths: torch.Tensor | int, past_lengths: torch.Tensor | int = 0
    ) -> torch.Tensor | int:
        """How many tokens so many frames complete, after `past_lengths` frames in the cache."""
        factor = self.config.subsampling_factor
        return (past_lengths + input_lengths) // factor - past_lengths // factor


class SumAggSpeechModel(SumAggSpeechPreTrainedModel, SumAggModel):
    """The bare summation aggregation model for speech."""

    def __init__(self, config: SumAggSpeechConfig):
        super().__init__(config)
        # Frames are embedded, and no ids.
        del self.embed_tokens
        self.embeddings = SumAggFrontEnd(config)
        self.post_init()

    @accepts_cache
    @can_return_tuple
    def forward(
        self,
        input_features: torch.FloatTensor,
        attention_mask: torch.Tensor | None = None,
        cache: Cache | None = None,
        use_cache: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> SumAggSpeechModelOutput:
        r"""
        Args:
            input_features (`torch.FloatTensor` of shape `[B, T, num_mel_bins]`): log-mel frames, as
                [`~transformers.Speech2TextFeatureExtractor`] makes them with `do_ceptral_normalize=False`.
            attention_mask (`torch.Tensor` of shape `[B, past + T]`, *optional*): 1 for real frames, 0 for padding, which
                may stand anywhere.
            cache ([`~transformers.Cache`], *optional*): the decode state of the frames before these.
            use_cache (`bool`, *optional*): whether to return the decode state.

        Returns:
            [`SumAggSpeechModelOutput`]: `last_hidden_state` `[B, T', d]` of the tokens that these frames complete, `T'` in
            the row that has most. A row that has fewer has them first, and then its last one again.

        Raises:
            `TypeError`: `input_features` of an integer dtype.
            `ValueError`: a wrong shape; a real frame that is not finite; a cache of another model, any in a bidirectional
                model, or in one with full attention.
        """
        config = self.config
        if input_features.dim() != 3 or input_features.shape[2] != config.num_mel_bins:
            raise ValueError(
                f"`input_features` must have the shape [B, T, F] with F = {config.num_mel_bins} (`config.num_mel_bins`), "
                f"got {list(input_features.shape)}."
            )
        if not input_features.is_floating_point():
            raise TypeError(f"`input_features` must be of a floating dtype, got {input_features.dtype}.")
        use_cache = config.use_cache if use_cache is None else use_cache
        if cache is None and use_cache and config.is_causal:
            cache = DynamicCache(config=config)
        blocks_cache = None if cache is None else adopt_cache_of_frames(cache, config)
        layout, _, _ = sequence_layout(input_features, attention_mask, None, cache)
        if is_concrete(input_features):
            finite = input_features.isfinite().all(dim=2)
            if not (finite if layout.attention_mask is None else finite | ~layout.attention_mask).all():
                raise ValueError("`input_features` must be finite, got NaN or infinity: look for them in the audio.")

        inputs_embeds, numbers = self.embeddings(input_features, layout, cache, self.dtype)
        inputs_embeds, layout, mask = self._layout_of_tokens(inputs_embeds, numbers, layout, blocks_cache)
        outputs = super().forward(
            inputs_embeds=inputs_embeds,
            attention_mask=layout.to_masks(),
            cache=blocks_cache,
            use_cache=False,
            return_dict=True,
            **kwargs,
        )
        return SumAggSpeechModelOutput(
            last_hidden_state=outputs.last_hidden_state,
            **named_cache(cache),
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            token_mask=mask.long(),
        )

    def _layout_of_tokens(
        self, inputs_embeds: torch.Tensor, numbers: torch.Tensor, frames: SequenceLayout, cache: Cache | None
    ) -> tuple[torch.Tensor, SequenceLayout, torch.Tensor]:
        """The tokens `[B, T', d]` without the columns that no row has, their layout, and which of them there are."""
        mask = numbers >= 0
        all_real = cache is None and frames.attention_mask is None
        if not all_real and is_concrete(numbers):
            shortest, longest = torch.stack(torch.aminmax(mask.sum(dim=1))).tolist()
            inputs_embeds, numbers, mask = (tensor[:, :longest] for tensor in (inputs_embeds, numbers, mask))
            all_real = shortest == longest
        real = None if all_real else mask
        layout = SequenceLayout(numbers.clamp(min=0), real, None, None, {})
        masks = attention_masks(self.config, inputs_embeds, self.dtype, layout, real, False, cache)
        return inputs_embeds, layout._replace(masks=masks), mask


class SumAggForCTC(SumAggSpeechPreTrainedModel):
    """The summation aggregation model for speech with a head for connectionist temporal classification."""

    # The loss is a mean over the batch: `Trainer` has to divide by the accumulation steps.
    accepts_loss_kwargs = False

    def __init__(self, config: SumAggSpeechConfig):
        super().__init__(config)
        self.model = SumAggSpeechModel(config)
        self.dropout = nn.Dropout(config.classifier_dropout)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=config.lm_head_bias)
        self.post_init()

    @accepts_cache
    @can_return_tuple
    def forward(
        self,
        input_features: torch.FloatTensor,
        attention_mask: torch.Tensor | None = None,
        cache: Cache | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> SumAggCTCOutput:
        r"""
        Args:
            labels (`torch.LongTensor` of shape `[B, L]`, *optional*): the symbols that each row spells, without blanks,
                padded with -100.

        Returns:
            [`SumAggCTCOutput`]: `logits` `[B, T', vocab_size]` of the tokens that these frames complete, `T'` in the row
            that has most. A row that has fewer has its own first and blanks after them, so that greedy decoding finds the
            same text, and the same times of its words, as in the row alone.

        The other arguments and the errors are those of the bare model's `forward`. Also raised:
            `ValueError`: `labels` of the wrong shape, outside the vocabulary, or the blank; or with a `cache`.
        """
        if labels is not None:
            self._check_labels(labels, input_features, cache)
        outputs: SumAggSpeechModelOutput = self.model(
            input_features, attention_mask=attention_mask, cache=cache, use_cache=use_cache, **kwargs
        )
        logits, mask = self.lm_head(self.dropout(outputs.last_hidden_state)), outputs.token_mask
        blank = logits.new_full(logits.shape[-1:], -1e4)
        blank[self.config.pad_token_id] = 0
        logits = torch.where(mask.bool()[..., None], logits, blank)
        loss = None
        if labels is not None:
            loss = self._loss(logits, labels.to(logits.device), mask.sum(dim=1))
        return SumAggCTCOutput(
            loss=loss,
            logits=logits,
            **named_cache(outputs.cache),
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            token_mask=mask,
        )

    def _check_labels(self, labels: torch.Tensor, input_features: torch.Tensor, cache: Cache | None) -> None:
        if cache is not None:
            raise ValueError("`labels` spell the whole audio: pass it whole, and no `cache`.")
        blank, size = self.config.pad_token_id, self.config.vocab_size
        check_labels(labels, torch.Size((input_features.shape[0], labels.shape[-1])), "[B, L]", size)
        if is_concrete(labels) and (wrong := labels[(labels >= size) | (labels == blank)]).numel():
            raise ValueError(
                f"`labels` must be in [0, {size}), without the blank, {blank} (`config.pad_token_id`), and padded with "
                f"-100, got {wrong[0]}."
            )

    def _loss(self, logits: torch.Tensor, labels: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        """As transformers' models for CTC, over the first `lengths` `[B]` of the logits."""
        real = labels >= 0
        if logits.shape[1] == 0:
            logits = F.pad(logits, (0, 0, 0, 1))  # PyTorch takes no empty tensor
        log_probs = F.log_softmax(logits, dim=-1, dtype=torch.promote_types(logits.dtype, torch.float32))
        with torch.backends.cudnn.flags(enabled=False):
            return F.ctc_loss(
                log_probs.transpose(0, 1),
                labels.masked_select(real),
                lengths,
                real.sum(dim=1),
                blank=self.config.pad_token_id,
                reduction=self.config.ctc_loss_reduction,
                zero_infinity=self.config.ctc_zero_infinity,
            )


class SumAggForAudioClassification(SumAggSpeechPreTrainedModel):
    """The summation aggregation model for speech with a classification or regression head on a pooled vector."""

    accepts_loss_kwargs = False
    can_stream = False

    def __init__(self, config: SumAggSpeechConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.loss_type = "ForSequenceClassification"
        self.model = SumAggSpeechModel(config)
        self.pooler = SumAggPooler(config)
        self.dropout = nn.Dropout(config.classifier_dropout)
        self.score = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_features: torch.FloatTensor,
        attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> SequenceClassifierOutput:
        r"""
        A recording is classified as a whole: there is no decode state to go on from.

        Args:
            labels (`torch.Tensor`, *optional*): `[B]` class indices, or `[B]` or `[B, num_labels]` targets for
                regression, or `[B, num_labels]` for several labels, by `config.problem_type`.

        The other arguments and the errors are those of the bare model's `forward`. Also raised:
            `ValueError`: `labels` of the wrong shape, or a class index that does not exist; or a cache.
        """
        if find_cache(kwargs) is not None or kwargs.pop("use_cache", False):
            raise ValueError("A classifier of audio takes the whole recording, and no `cache`.")
        outputs: SumAggSpeechModelOutput = self.model(input_features, attention_mask=attention_mask, **kwargs)
        hidden_states, mask = outputs.last_hidden_state, outputs.token_mask
        if hidden_states.shape[1] == 0:
            # No tokens are pooled as one that is masked: their sum is zero.
            hidden_states, mask = F.pad(hidden_states, (0, 0, 0, 1)), F.pad(mask, (0, 1))
        logits = self.score(self.dropout(self.pooler(hidden_states, mask)))
        loss = None
        if labels is not None:
            labels = labels_of_rows(labels, logits, self.config)
            loss = loss_of_classes(
                self.loss_function, labels, self.num_labels, pooled_logits=logits, config=self.config
            )
        return SequenceClassifierOutput(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


__all__ = [
    "SumAggForAudioClassification",
    "SumAggForCTC",
    "SumAggSpeechModel",
    "SumAggSpeechPreTrainedModel",
]
