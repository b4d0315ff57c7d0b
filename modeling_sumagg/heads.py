"""The heads that the text models share: the forward passes, as in `transformers.modeling_layers`.

A class that inherits one provides `model` and the modules that the head names.
"""

import torch
from torch import nn
from torch.nn import functional as F
from transformers import Cache, PreTrainedModel
from transformers.modeling_outputs import (
    BaseModelOutputWithPast,
    CausalLMOutputWithPast,
    SequenceClassifierOutputWithPast,
    TokenClassifierOutput,
)
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple, is_tracing

from .ops.token_blocks import is_intercepted, is_plain_linear


class ForCausalLM:
    """Language modelling head: `lm_head` on every token."""

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | dict[str, torch.Tensor | None] | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Unpack[TransformersKwargs],
    ) -> CausalLMOutputWithPast:
        r"""
        Args:
            labels (`torch.LongTensor` of shape `[B, T]`, *optional*): the token ids to predict, usually `input_ids`
                itself (they are shifted here); -100 is ignored.
            logits_to_keep (`int` or `torch.Tensor`, defaults to 0): compute the logits of the last so many tokens
                only, 0 for all; or the indices of the tokens.

        With `labels`, in training and with `config.fuse_linear_cross_entropy`, there is a loss but no `logits`.

        The other arguments and the errors are those of the bare model's `forward`. Also raised:
            `ValueError`: `labels` of another shape than the logits, or outside the vocabulary; an output layer that
                the fused loss does not know.
        """
        outputs: BaseModelOutputWithPast = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        loss, logits = language_model_loss(self, outputs.last_hidden_state[:, kept], labels, is_causal=True, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


class ForSequenceClassification:
    """Sequence classification or regression head: `score` on what `pooler` makes of the real tokens."""

    # The loss is a mean over the batch: `Trainer` has to divide by the accumulation steps.
    accepts_loss_kwargs = False

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
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
        outputs: BaseModelOutputWithPast = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        hidden_states = outputs.last_hidden_state
        if attention_mask is not None:
            attention_mask = attention_mask[:, attention_mask.shape[1] - hidden_states.shape[1] :]
        logits = self.score(self.dropout(self.pooler(hidden_states, attention_mask)))
        loss = None
        if labels is not None:
            problem_type = self.config.problem_type
            if problem_type is None and self.num_labels > 1 and not labels.is_floating_point():
                problem_type = "single_label_classification"
            if problem_type == "single_label_classification":
                check_labels(labels, logits.shape[:1], "[B]", self.num_labels)
            elif self.num_labels == 1 and labels.dim() == 1:
                check_labels(labels, logits.shape[:1], "[B]", None)
            else:
                check_labels(labels, logits.shape, "[B, num_labels]", None)
            loss = self.loss_function(labels=labels, pooled_logits=logits, config=self.config)
        return SequenceClassifierOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


class ForTokenClassification:
    """Token classification head: `score` on every token."""

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
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
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        logits = self.score(self.dropout(outputs.last_hidden_state))
        loss = None
        if labels is not None:
            check_labels(labels, logits.shape[:2], "[B, T]", self.num_labels)
            loss = self.loss_function(logits=logits, labels=labels, config=self.config, **kwargs)
        return TokenClassifierOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


def check_labels(labels: torch.Tensor, shape: torch.Size, meaning: str, num_classes: int | None) -> None:
    """
    Check labels before a loss fails on them deep inside.

    Args:
        labels (`torch.Tensor`): the labels.
        shape (`torch.Size`): the shape they must have.
        meaning (`str`): that shape in letters.
        num_classes (`int`, *optional*): labels must be below it, or -100, which a loss ignores. `None`: not checked.

    Raises:
        `ValueError`: another shape, or (unless a graph is traced) another value.
    """
    if labels.shape != shape:
        raise ValueError(f"`labels` must have the shape {meaning} = {list(shape)}, got {list(labels.shape)}.")
    if num_classes is None or is_tracing(labels) or labels.device.type == "meta":
        return
    unknown = labels[(labels != -100) & ((labels < 0) | (labels >= num_classes))]
    if unknown.numel() > 0:
        raise ValueError(f"`labels` must be in [0, {num_classes}), or -100 to be ignored, got {unknown[0].item()}.")


def language_model_loss(
    model: PreTrainedModel,
    hidden_states: torch.Tensor,
    labels: torch.Tensor | None,
    *,
    is_causal: bool,
    **kwargs,
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """The loss, if there are `labels`, and the logits, unless the loss is fused with the output layer."""
    if labels is None:
        return None, model.lm_head(hidden_states)
    check_labels(labels, hidden_states.shape[:2], "[B, T]", model.config.vocab_size)
    if model.training and model.config.fuse_linear_cross_entropy:
        return fused_language_model_loss(hidden_states, model.lm_head, labels, is_causal=is_causal, **kwargs), None
    logits = model.lm_head(hidden_states)
    return model.loss_function(logits=logits, labels=labels, vocab_size=model.config.vocab_size, **kwargs), logits


def fused_language_model_loss(
    hidden_states: torch.Tensor,
    lm_head: nn.Module,
    labels: torch.Tensor,
    *,
    is_causal: bool,
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
        is_causal (`bool`): whether each token predicts the one after it, and not itself.
        num_items_in_batch (`torch.Tensor` or `int`, *optional*): what to divide the sum over tokens by; by default
            the tokens whose label is not `ignore_index`.
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
    if not is_plain_linear(lm_head):
        raise ValueError(
            "`fuse_linear_cross_entropy` reads the weight of the output layer, which has to be a whole `nn.Linear` "
            f"without hooks, not a {type(lm_head).__module__}.{type(lm_head).__name__} with a "
            f"{type(lm_head.weight).__name__} of shape {list(lm_head.weight.shape)}"
            f"{' and hooks' if is_intercepted(lm_head) else ''}: {remedy}."
        )
    if is_causal:
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
    return loss.to(dtype).sum() / (count.to(loss.device) if torch.is_tensor(count) else count)
