"""The models with a head, as in `transformers.modeling_layers`.

A family's model inherits from its `DecoderPreTrainedModel` and a head, and names its bare model as `model_class`.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import Cache, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import MaskedLMOutput, TokenClassifierOutput
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple

from ..common.checks import check_labels, labels_of_rows, loss_of_classes
from ..common.compatibility import (
    BaseModelOutputWithPast,
    CausalLMOutputWithPast,
    SequenceClassifierOutputWithPast,
    accepts_cache,
    named_cache,
)
from .generation import RecurrentGenerationMixin
from .layout import SequenceLayout, is_static, last_real_hidden_states, of_segment
from .model import DecoderModel, DecoderPreTrainedModel
from .recurrence import RecurrentLayer, recur


class _LanguageModel(DecoderPreTrainedModel):
    model_class: type[DecoderModel]
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}

    def __init__(self, config: PreTrainedConfig):
        super().__init__(config)
        self.model = self.model_class(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=config.lm_head_bias)
        self.post_init()


class ForCausalLM(_LanguageModel, RecurrentGenerationMixin):
    """Language modelling head: `lm_head` on every token."""

    @accepts_cache
    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | dict[str, Any] | None = None,
        position_ids: torch.LongTensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Unpack[TransformersKwargs],
    ) -> CausalLMOutputWithPast:
        r"""
        Args:
            labels (`torch.LongTensor` of shape `[B, T]`, *optional*): the token ids to predict, usually `input_ids`
                itself (they are shifted here); -100 is ignored. As in transformers' models the mask hides no label:
                after padding on the left, padding predicts the first real token unless its label is -100.
            logits_to_keep (`int` or `torch.Tensor`, defaults to 0): compute the logits of the last so many tokens
                only, 0 for all; or the indices of the tokens.

        With `labels`, in training and with `config.fuse_linear_cross_entropy`, there is a loss but no `logits`.

        The other arguments and the errors are those of the bare model's `forward`. Also raised:
            `ValueError`: `labels` of another shape than the logits, or outside the vocabulary; an output layer that
                the fused loss does not know.
        """
        outputs: BaseModelOutputWithPast = self.model(
            input_ids, attention_mask, position_ids, cache, inputs_embeds=inputs_embeds, use_cache=use_cache, **kwargs
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        loss, logits = language_model_loss(
            self, outputs.last_hidden_state[:, kept], labels, predicts_next=True, **kwargs
        )
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            **named_cache(outputs.cache),
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


class ForMaskedLM(_LanguageModel):
    """Masked language modelling head: `lm_head` on every token of a bidirectional model."""

    @accepts_cache
    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> MaskedLMOutput:
        r"""
        Args:
            labels (`torch.LongTensor` of shape `[B, T]`, *optional*): the token ids to predict; -100 is ignored.

        With `labels`, in training and with `config.fuse_linear_cross_entropy`, there is a loss but no `logits`.

        The other arguments and the errors are those of the bare model's `forward`. Also raised:
            `ValueError`: `labels` of another shape than the logits, or outside the vocabulary; an output layer that
                the fused loss does not know.
        """
        outputs: BaseModelOutputWithPast = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            **kwargs,
        )
        loss, logits = language_model_loss(self, outputs.last_hidden_state, labels, predicts_next=False, **kwargs)
        return MaskedLMOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


def pool(operator: Callable, inputs: torch.Tensor, attention_mask: torch.Tensor | None, cache: Cache | None) -> Any:
    """
    Run a recurrence whose outputs are of rows and not of tokens; with a cache on from the tokens in it. The first layer
    of the cache that holds a state holds this one too.

    Args:
        operator (`Callable`): as at the head of `recurrence.py`, but for its outputs.
        inputs (`torch.Tensor` of shape `[B, T, d]`): the segment.
        attention_mask (`torch.Tensor` of shape `[B, T]`, bool or 0/1, *optional*): its real tokens.
        cache (`transformers.Cache`, *optional*): the cache that the model has filled with the segment.

    Raises:
        `ValueError`: there are tokens in the cache before the segment, and no layer to hold a state.
    """
    length = inputs.shape[1]
    layers = [] if cache is None else cache.layers
    holder = next((i for i, layer in enumerate(layers) if isinstance(layer, RecurrentLayer)), None)
    if holder is None and cache is not None and int(cache.get_seq_length()) > length:
        raise ValueError(
            "A classifier whose layers all attend keeps nothing of what it has pooled: pass the whole text and no `cache`."
        )
    mask = None if attention_mask is None else attention_mask.bool()
    layout = SequenceLayout(torch.arange(length)[None], mask, None, None, {})
    return recur(operator, inputs, layout, None if holder is None else cache, holder or 0)


def last_token(
    hidden_states: torch.Tensor,
    *,
    initial_state: torch.Tensor | None,
    attention_mask: torch.Tensor | None,
    document_ids: None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The hidden state of the last real token of each row, `[B, d]`, as output and as state."""
    last = last_real_hidden_states(hidden_states, attention_mask)[:, -1]
    if attention_mask is not None and initial_state is not None:
        last = torch.where(attention_mask.any(dim=1, keepdim=True), last, initial_state.to(last))
    return last, last


class LastTokenPooler(nn.Module):
    """The hidden state of the last real token, `[B, d]`."""

    def __init__(self, config: PreTrainedConfig):
        super().__init__()

    def forward(
        self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None, cache: Cache | None = None
    ) -> torch.Tensor:
        return pool(last_token, hidden_states, attention_mask, cache)


class _Classifier(DecoderPreTrainedModel):
    model_class: type[DecoderModel]
    pooler_class: type[nn.Module] | None = None

    def __init__(self, config: PreTrainedConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.model = self.model_class(config)
        if self.pooler_class is not None:
            self.pooler = self.pooler_class(config)
        self.dropout = nn.Dropout(config.classifier_dropout)
        self.score = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()


class ForSequenceClassification(_Classifier):
    """
    Sequence classification or regression head: `score` on the vector `[B, d]` that `pooler(hidden_states,
    attention_mask, cache)`, a `pooler_class(config)`, makes of the real tokens, by [`pool`] of those in the cache too.
    """

    pooler_class = LastTokenPooler
    # The loss is a mean over the batch: `Trainer` has to divide by the accumulation steps.
    accepts_loss_kwargs = False

    @accepts_cache
    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> SequenceClassifierOutputWithPast:
        r"""
        Args:
            attention_mask (`torch.Tensor` of shape `[B, past + T]`, *optional*): 1 for real tokens. Only real tokens
                are pooled; without a mask every token is real, whatever its id.
            labels (`torch.Tensor`, *optional*): `[B]` class indices, or `[B]` or `[B, num_labels]` targets for
                regression, or `[B, num_labels]` for several labels, by `config.problem_type`.

        The other arguments and the errors are those of the bare model's `forward`. Also raised:
            `ValueError`: `labels` of the wrong shape, or a class index that does not exist.
        """
        past_length = 0 if cache is None else cache.get_seq_length()
        if isinstance(past_length, torch.Tensor):
            past_length = past_length.clone()  # which the cache counts on in place
        outputs: BaseModelOutputWithPast = self.model(
            input_ids, attention_mask, position_ids, cache, inputs_embeds=inputs_embeds, use_cache=use_cache, **kwargs
        )
        hidden_states = outputs.last_hidden_state
        if attention_mask is not None:
            attention_mask = attention_mask.to(hidden_states.device, torch.bool)
            attention_mask = of_segment(attention_mask, hidden_states.shape[1], past_length, is_static(cache))
        if hidden_states.shape[1] == 0:
            # No tokens are pooled as one that is masked: their sum is zero.
            hidden_states = F.pad(hidden_states, (0, 0, 0, 1))
            attention_mask = hidden_states.new_zeros(hidden_states.shape[:2], dtype=torch.bool)
        logits = self.score(self.dropout(self.pooler(hidden_states, attention_mask, outputs.cache)))
        loss = None
        if labels is not None:
            labels = labels_of_rows(labels, logits, self.config)
            loss = loss_of_classes(
                self.loss_function, labels, self.num_labels, pooled_logits=logits, config=self.config
            )
        return SequenceClassifierOutputWithPast(
            loss=loss,
            logits=logits,
            **named_cache(outputs.cache),
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


class ForTokenClassification(_Classifier):
    """Token classification head: `score` on every token."""

    @accepts_cache
    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> TokenClassifierOutput:
        r"""
        Args:
            labels (`torch.LongTensor` of shape `[B, T]`, *optional*): the class of each token; -100 is ignored.

        The other arguments and the errors are those of the bare model's `forward`. Also raised:
            `ValueError`: `labels` of the wrong shape, or a class index that does not exist.
        """
        outputs: BaseModelOutputWithPast = self.model(
            input_ids, attention_mask, position_ids, cache, inputs_embeds=inputs_embeds, use_cache=use_cache, **kwargs
        )
        logits = self.score(self.dropout(outputs.last_hidden_state))
        loss = None
        if labels is not None:
            check_labels(labels, logits.shape[:2], "[B, T]", self.num_labels)
            loss = loss_of_classes(
                self.loss_function, labels.long(), self.num_labels, logits=logits, config=self.config, **kwargs
            )
        return TokenClassifierOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


def language_model_loss(
    model: PreTrainedModel,
    hidden_states: torch.Tensor,
    labels: torch.Tensor | None,
    *,
    predicts_next: bool,
    **kwargs,
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """The loss, if there are `labels`, and the logits, unless the loss is fused with the output layer."""
    if labels is None:
        return None, model.lm_head(hidden_states)
    vocab_size = model.config.vocab_size
    check_labels(labels, hidden_states.shape[:2], "[B, T]", vocab_size)
    labels = labels.long()
    if model.training and model.config.fuse_linear_cross_entropy:
        arguments = {
            "hidden_states": hidden_states,
            "lm_head": model.lm_head,
            "predicts_next": predicts_next,
            **kwargs,
        }
        return loss_of_classes(fused_language_model_loss, labels, vocab_size, **arguments), None
    logits = model.lm_head(hidden_states)
    arguments = {"logits": logits, "vocab_size": vocab_size, **kwargs}
    return loss_of_classes(model.loss_function, labels, vocab_size, **arguments), logits


def fused_language_model_loss(
    hidden_states: torch.Tensor,
    lm_head: nn.Module,
    labels: torch.Tensor,
    *,
    predicts_next: bool,
    num_items_in_batch: torch.Tensor | int | None = None,
    ignore_index: int = -100,
    shift_labels: torch.Tensor | None = None,
    **kwargs,
) -> torch.Tensor:
    """
    transformers' loss of a language model, without ever holding the logits `lm_head(hidden_states)` of all tokens.

    Args:
        hidden_states (`torch.Tensor` of shape `[B, T, d]`): what the output layer reads.
        lm_head (`nn.Linear`): the output layer.
        labels (`torch.Tensor` of shape `[B, T]`): the tokens to predict.
        predicts_next (`bool`): whether each token predicts the one after it, and not itself.
        num_items_in_batch (`torch.Tensor` or `int`, *optional*): what to divide the sum over tokens by, at least 1; by
            default the tokens whose label is not `ignore_index`.
        ignore_index (`int`, defaults to -100): the label of a token without loss.
        shift_labels (`torch.Tensor` of shape `[B, T]`, *optional*): the token after each, where `labels` do not tell.

    Returns:
        `torch.Tensor` of shape `[]`, float32 (float64 for float64).

    Raises:
        `ValueError`: this PyTorch has no `linear_cross_entropy`, or `lm_head` is not a whole linear layer, but sharded,
            quantized, wrapped or with hooks.
    """
    remedy = "set `fuse_linear_cross_entropy=False` in the config of the model"
    if not hasattr(F, "linear_cross_entropy"):
        raise ValueError(
            f"`fuse_linear_cross_entropy` needs `torch.nn.functional.linear_cross_entropy`, which PyTorch "
            f"{torch.__version__} lacks and 2.13 has: update PyTorch, or {remedy}."
        )
    if not _is_plain_linear(lm_head):
        raise ValueError(
            "`fuse_linear_cross_entropy` reads the weight of the output layer, which has to be a whole `nn.Linear` "
            f"without hooks, not a {type(lm_head).__module__}.{type(lm_head).__name__} with a "
            f"{type(lm_head.weight).__name__} of shape {list(lm_head.weight.shape)}"
            f"{' and hooks' if _has_hooks(lm_head) else ''}: {remedy}."
        )
    if predicts_next:
        labels = F.pad(labels[:, 1:], (0, 1), value=ignore_index) if shift_labels is None else shift_labels
    weight, bias = lm_head.weight, lm_head.bias
    device_type = hidden_states.device.type
    if torch.is_autocast_enabled(device_type):
        dtype = torch.get_autocast_dtype(device_type)
        hidden_states, weight = hidden_states.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    dtype = torch.promote_types(hidden_states.dtype, torch.float32)
    # The losses are in the dtype of the hidden states, in which a sum over many tokens would be rounded.
    reduction = "sum" if hidden_states.dtype == dtype else "none"
    loss = F.linear_cross_entropy(
        hidden_states.flatten(0, 1),
        weight,
        labels.flatten(),
        linear_bias=bias,
        reduction=reduction,
        ignore_index=ignore_index,
        # The logits of so many tokens are as large as the weight, whose gradient every chunk passes over.
        options=nn.LinearCrossEntropyOptions(
            batch_chunk_size=lm_head.in_features, allow_retain_graph=torch.compiler.is_compiling()
        ),
    )
    count = (labels != ignore_index).sum() if num_items_in_batch is None else num_items_in_batch
    # Where no token has a label, loss and gradients are zero, and not 0 / 0.
    return loss.to(dtype).sum() / torch.as_tensor(count, device=loss.device).clamp(min=1)


def _is_plain_linear(module: nn.Module) -> bool:
    """Whether it is a whole `nn.Linear` that does nothing else: no adapter, not sharded or quantized, without hooks."""
    return (
        type(module) is nn.Linear
        and type(module.weight) is nn.Parameter
        and module.weight.shape == (module.out_features, module.in_features)
        and not _has_hooks(module)
    )


def _has_hooks(module: nn.Module) -> bool:
    """Whether hooks or another `forward` act on a call of the module."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return "forward" in module.__dict__ or any(hooks)
