"""What the summation paper compares its classifier and its regression with: one softmax attention layer over the text."""

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedConfig


class AttentionPooling(nn.Module):
    """
    Positions added, one softmax attention layer, the mean of its outputs over the real tokens.

    Args:
        config (`PreTrainedConfig`): with `vocab_size`, `hidden_size`, `max_position_embeddings`, `initializer_range`.
        num_heads (`int`, defaults to 8): heads of the attention layer.
        need_weights (`bool`, defaults to `False`): attend by the formula, with its T × T weights, and not by PyTorch's fused
            attention.
    """

    def __init__(self, config: PreTrainedConfig, num_heads: int = 8, need_weights: bool = False):
        super().__init__()
        self.need_weights = need_weights
        self.tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.positions = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.attention = nn.MultiheadAttention(config.hidden_size, num_heads, batch_first=True)
        for embedding in (self.tokens, self.positions):
            nn.init.normal_(embedding.weight, std=config.initializer_range)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        """`input_ids` and `attention_mask` `[B, T]` to `[B, d]`, zero for a text without tokens."""
        x = self.tokens(input_ids) + self.positions.weight[: input_ids.shape[1]]
        hidden_tokens = None
        if attention_mask is not None:
            attention_mask = attention_mask.bool()
            # The softmax needs one token, also where there is none; the mean leaves it out.
            hidden_tokens = ~attention_mask
            hidden_tokens[:, :1] = False
        attended, _ = self.attention(x, x, x, key_padding_mask=hidden_tokens, need_weights=self.need_weights)
        if attention_mask is None:
            return attended.mean(dim=1)
        count = attention_mask.sum(dim=1, keepdim=True).clamp(min=1)
        return (attended * attention_mask[..., None]).sum(dim=1) / count


class AttentionClassifier(nn.Module):
    """The published baseline of the document classifier: [`AttentionPooling`] and a linear output."""

    def __init__(self, config: PreTrainedConfig, num_heads: int = 8, need_weights: bool = False):
        super().__init__()
        self.text = AttentionPooling(config, num_heads, need_weights)
        self.score = nn.Linear(config.hidden_size, config.num_labels)

    def forward(
        self, input_ids: torch.Tensor, labels: torch.Tensor, attention_mask: torch.Tensor | None = None
    ) -> dict[str, torch.Tensor]:
        logits = self.score(self.text(input_ids, attention_mask))
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


class ConcatenationRegression(nn.Module):
    """
    The published baseline of the multimodal regression: [`AttentionPooling`], the standardised numbers concatenated, and
    the same layers from there to the output. A number that is not given is the mean.
    """

    def __init__(self, config: PreTrainedConfig):
        super().__init__()
        self.config = config
        self.text = AttentionPooling(config)
        sizes = [config.hidden_size + config.num_numeric_features, *config.head_hidden_sizes]
        layers = [layer for a, b in zip(sizes[:-1], sizes[1:], strict=True) for layer in (nn.Linear(a, b), nn.ReLU())]
        self.head = nn.Sequential(*layers, nn.Dropout(config.classifier_dropout), nn.Linear(sizes[-1], 1))

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        numeric_features: torch.Tensor,
        labels: torch.Tensor,
    ) -> dict[str, torch.Tensor]:
        text = self.text(input_ids, attention_mask)
        statistics = (self.config.numeric_mean, self.config.numeric_std, self.config.label_mean, self.config.label_std)
        # In the dtype of the labels, by default float64: nothing is rounded before it is standardised.
        feature_mean, feature_std, mean, std = (labels.new_tensor(values) for values in statistics)
        numbers = ((numeric_features.to(labels) - feature_mean) / feature_std).nan_to_num(nan=0.0)
        scores = self.head(torch.cat((text, numbers.to(text)), dim=1))[:, 0]
        targets = ((labels - mean) / std).to(scores)
        return {"loss": F.mse_loss(scores, targets), "logits": scores.to(labels) * std + mean}
