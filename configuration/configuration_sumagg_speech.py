"""Configuration of the summation aggregation models for speech."""

import math
from typing import Any, ClassVar, Literal

from huggingface_hub.dataclasses import strict

from .configuration_sumagg import SumAggConfig


@strict
class SumAggSpeechConfig(SumAggConfig):
    r"""
    Configuration of a [`SumAggSpeechModel`] and of the models with a head on top of it. A causal front end makes one token
    of every `subsampling_factor` log-mel frames, and the blocks of [`SumAggConfig`] run over these tokens. By default
    every block sums, so the decode state of a stream has a constant size.

    Args:
        num_mel_bins (`int`, defaults to 80): values of a frame.
        subsampling_factor (`int`, defaults to 4): frames from one token to the next.
        subsampling_kernel_size (`int`, defaults to 12): frames that a token is computed from, its own and earlier ones.
        feature_mean (`list[float]`, *optional*): mean of each mel bin in the training data. With `feature_std`, the model
            standardises the frames itself, independently of later frames.
        feature_std (`list[float]`, *optional*): their standard deviations.
        hop_length (`int`, defaults to 160): samples from one frame to the next.
        vocab_size (`int`, defaults to 32): number of symbols, the blank included.
        pad_token_id (`int`, defaults to 0): the blank of connectionist temporal classification (CTC).
        ctc_loss_reduction (`str`, defaults to `"mean"`): the losses of the rows of a batch are summed (`"sum"`), or divided
            by the lengths of their labels and averaged (`"mean"`).
        ctc_zero_infinity (`bool`, defaults to `False`): whether a row whose audio is too short for its labels has a loss of
            zero instead of infinity.
        apply_spec_augment (`bool`, defaults to `True`): whether frames and bins are masked in training (SpecAugment, arXiv
            1904.08779), as in transformers' Wav2Vec2 and Whisper. Masked values become the mean.
        mask_time_prob (`float`, defaults to 0.05): the share of the frames that are masked, before overlaps.
        mask_time_length (`int`, defaults to 10): frames masked together.
        mask_time_min_masks (`int`, defaults to 2): the fewest spans of frames that are masked.
        mask_feature_prob (`float`, defaults to 0.0): the share of the bins that are masked.
        mask_feature_length (`int`, defaults to 10): bins masked together.
        mask_feature_min_masks (`int`, defaults to 0): the fewest spans of bins that are masked.
        layer_types (`list[str]`, *optional*): the mixer of each block, `"summation"` (by default everywhere),
            `"sliding_attention"`, or `"full_attention"` in a model that does not stream.
        sum_map (`str`, defaults to `"relu"`), sum_skip (`bool`, defaults to `False`), conv_kernel_size (`int`,
            *optional*), conv_before (`str`, defaults to `"mixer"`): the summation mixers ([`SumAggConfig`]).
        mlp_gate (`bool`, defaults to `False`): whether the feed-forward layers are gated ([`TextConfig`]).
        pooling (`str`, defaults to `"mean"`): how an audio classifier pools ([`SumAggConfig`]).
        use_cache (`bool`, defaults to `False`): whether the model returns its decode state if the call gives none.
        kwargs: the arguments of [`SumAggConfig`]. Only attention layers have positions.

    Raises:
        `ValueError` or the strict dataclass's validation error: a value is of the wrong type or not allowed.

    Example:

    ```python
    >>> from modeling_sumagg import SumAggForCTC, SumAggSpeechConfig

    >>> config = SumAggSpeechConfig(hidden_size=64, num_hidden_layers=2)
    >>> config.inputs_to_logits_ratio
    640
    >>> model = SumAggForCTC(config)
    ```
    """

    model_type = "sumagg_speech"
    # The padding of a batch is no prediction.
    keys_to_ignore_at_inference = ["cache", "past_key_values", "token_mask"]
    values_of_0_1: ClassVar[dict[str, Any]] = SumAggConfig.values_of_0_2
    base_model_tp_plan = {
        name: plan for name, plan in SumAggConfig.base_model_tp_plan.items() if name != "embed_tokens"
    }

    num_mel_bins: int = 80
    subsampling_factor: int = 4
    subsampling_kernel_size: int = 12
    feature_mean: list[float | int] | None = None
    feature_std: list[float | int] | None = None
    hop_length: int = 160
    vocab_size: int = 32
    hidden_size: int = 192
    num_hidden_layers: int = 6
    num_attention_heads: int = 4
    position_embedding_type: Literal["none"] = "none"  # type: ignore[assignment]
    position_bias: float | int = 1.0
    sum_map: Literal["relu", "linear"] = "relu"
    sum_skip: bool | None = False
    sum_state_size: int | Literal["auto"] | None = None
    conv_kernel_size: int | Literal["auto"] | None = None
    conv_before: Literal["mixer", "terms"] = "mixer"
    mlp_gate: bool = False
    pooling: Literal["sum", "mean", "last"] = "mean"
    tie_word_embeddings: bool = False
    lm_head_bias: bool = True
    use_cache: bool = False
    pad_token_id: int = 0  # type: ignore[assignment]
    ctc_loss_reduction: Literal["sum", "mean"] = "mean"
    ctc_zero_infinity: bool = False
    apply_spec_augment: bool = True
    mask_time_prob: float | int = 0.05
    mask_time_length: int = 10
    mask_time_min_masks: int = 2
    mask_feature_prob: float | int = 0.0
    mask_feature_length: int = 10
    mask_feature_min_masks: int = 0

    @property
    def inputs_to_logits_ratio(self) -> int:
        """Samples of audio from one token to the next."""
        return self.hop_length * self.subsampling_factor

    def default_layer_types(self) -> list[str]:
        """Every block sums."""
        return ["summation"] * self.num_hidden_layers

    def validate_frames(self):
        """Part of `@strict`-powered validation: the frames, their statistics and their masking."""
        for name in ("num_mel_bins", "subsampling_factor", "hop_length", "mask_time_length"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, got {getattr(self, name)}.")
        if self.subsampling_kernel_size < self.subsampling_factor:
            raise ValueError(
                f"`subsampling_kernel_size` must be at least `subsampling_factor` = {self.subsampling_factor}, so that no "
                f"frame is left out, got {self.subsampling_kernel_size}."
            )
        mean, std = self.feature_mean, self.feature_std
        if (mean is None) != (std is None) or (
            mean is not None and std is not None and not len(mean) == len(std) == self.num_mel_bins
        ):
            raise ValueError(
                f"`feature_mean` and `feature_std` go together and must have `num_mel_bins` = {self.num_mel_bins} entries "
                f"each, got {mean} and {std}."
            )
        if not all(map(math.isfinite, mean or ())) or not all(0 < value < math.inf for value in std or ()):
            raise ValueError(f"`feature_mean` must be finite and `feature_std` above 0, got {mean} and {std}.")
        for name in ("mask_time_prob", "mask_feature_prob"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be in [0, 1), got {getattr(self, name)}.")
        if not 1 <= self.mask_feature_length <= self.num_mel_bins:
            raise ValueError(
                f"`mask_feature_length` must be in [1, {self.num_mel_bins}], got {self.mask_feature_length}."
            )
        if not 0 <= self.pad_token_id < self.vocab_size:
            raise ValueError(f"`pad_token_id`, the blank, must be in [0, {self.vocab_size}), got {self.pad_token_id}.")


__all__ = ["SumAggSpeechConfig"]
