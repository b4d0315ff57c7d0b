"""The heads that the text models share: the forward passes, as in `transformers.modeling_layers`.

A class that inherits one provides `model` and the modules that the head names.
"""

import torch
from transformers import Cache
from transformers.modeling_outputs import (
    BaseModelOutputWithPast,
    CausalLMOutputWithPast,
    SequenceClassifierOutputWithPast,
    TokenClassifierOutput,
)
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple, is_tracing


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

        The other arguments and the errors are those of the bare model's `forward`. Also raised:
            `ValueError`: `labels` of another shape than the logits, or outside the vocabulary.
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
        logits = self.lm_head(outputs.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            check_labels(labels, logits.shape[:2], "[B, T]", self.config.vocab_size)
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
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
