"""Collators: rows in which any modality may be missing, and speech with its transcripts."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase, ProcessorMixin


@dataclass
class DataCollatorForMultimodalRegression:
    """
    Collate rows for [`SumAggForMultimodalRegression`]. A modality that a row lacks becomes the model's "not given".

    A row may have `input_ids` (and `attention_mask`), `numeric_features` (`F` numbers), `pixel_values` (an array
    `[channels, height, width]`) and `label` or `labels`. A modality that is `None` or absent becomes an all-zero mask,
    NaN numbers or a NaN image; `None` among the numbers becomes NaN, and so does a missing label, which the model refuses.
    What no row of the batch has is left out.

    Args:
        tokenizer (`PreTrainedTokenizerBase`, *optional*): pads the texts; needed where rows have `input_ids`.
        pad_to_multiple_of (`int`, *optional*): pad the texts to a multiple of this length.
        dtype (`torch.dtype`, defaults to `torch.float64`): of numbers and of labels that are not whole. The model
            standardises them before it rounds them; Apple's devices need `torch.float32`.

    Returns:
        `dict[str, torch.Tensor]`: `input_ids` and `attention_mask` `[B, T]` int64, `numeric_features` `[B, F]` of `dtype`,
        `pixel_values` `[B, channels, height, width]` float32, and `labels` `[B]` or `[B, num_labels]`: int64 where all
        are whole numbers by their type, otherwise of `dtype`.

    Raises:
        `ValueError`: rows have `input_ids` and there is no tokenizer, or rows have numbers, images or labels of several
            shapes.
    """

    tokenizer: PreTrainedTokenizerBase | None = None
    pad_to_multiple_of: int | None = None
    dtype: torch.dtype = torch.float64

    def __call__(self, features: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        batch = {}
        if any(row.get("input_ids") is not None for row in features):
            batch.update(self._pad_texts(features))
        for name, dtype in (("numeric_features", self.dtype), ("pixel_values", torch.float32)):
            rows = [row.get(name) for row in features]
            if any(row is not None for row in rows):
                batch[name] = _stack(name, rows).to(dtype)
        labels = [row.get("label") if row.get("labels") is None else row["labels"] for row in features]
        if any(label is not None for label in labels):
            batch["labels"] = self._stack_labels(labels)
        return batch

    def _stack_labels(self, labels: list[Any]) -> torch.Tensor:
        whole = all(label is not None and np.asarray(label).dtype.kind in "biu" for label in labels)
        if whole:
            return torch.from_numpy(_stack_arrays("labels", [np.asarray(label, dtype=np.int64) for label in labels]))
        return _stack("labels", labels).to(self.dtype)

    def _pad_texts(self, features: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        if self.tokenizer is None:
            raise ValueError("Rows have `input_ids`: give the collator the `tokenizer` that pads them.")
        texts = []
        for row in features:
            input_ids = [] if row.get("input_ids") is None else np.asarray(row["input_ids"], dtype=np.int64).tolist()
            mask = row.get("attention_mask") if input_ids else []
            mask = [1] * len(input_ids) if mask is None else np.asarray(mask, dtype=np.int64).tolist()
            texts.append({"input_ids": input_ids, "attention_mask": mask})
        padded = self.tokenizer.pad(texts, pad_to_multiple_of=self.pad_to_multiple_of)
        return {name: torch.tensor(padded[name], dtype=torch.long) for name in ("input_ids", "attention_mask")}


@dataclass
class DataCollatorForCTC:
    """
    Collate rows for [`SumAggForCTC`]: the frames are padded, with a mask, and the labels too, with -100.

    Args:
        processor (`ProcessorMixin`): its feature extractor pads the frames.

    Returns:
        `dict[str, torch.Tensor]`: `input_features` `[B, F, num_mel_bins]` float32, `attention_mask` `[B, F]` and `labels`
        `[B, L]` int64, of rows with `input_features` `[F, num_mel_bins]` and `labels`, the symbols that are said.
    """

    processor: ProcessorMixin

    def __call__(self, features: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        frames = [{"input_features": np.array(row["input_features"])} for row in features]
        batch = self.processor.feature_extractor.pad(frames, padding=True, return_tensors="pt")
        labels = [torch.tensor(row["labels"], dtype=torch.long) for row in features]
        padded = torch.nn.utils.rnn.pad_sequence(labels, batch_first=True, padding_value=-100)
        return {**batch, "labels": padded}


def _stack(name: str, rows: Sequence[Any]) -> torch.Tensor:
    """The rows as one float64 tensor, NaN for a row that is `None`."""
    arrays = [None if row is None else np.asarray(row, dtype=np.float64) for row in rows]
    missing = np.full(next(array.shape for array in arrays if array is not None), np.nan)
    return torch.from_numpy(_stack_arrays(name, [missing if array is None else array for array in arrays]))


def _stack_arrays(name: str, arrays: list[np.ndarray]) -> np.ndarray:
    shapes = {array.shape for array in arrays}
    if len(shapes) > 1:
        raise ValueError(f"`{name}` must have the same shape in every row, got {sorted(shapes)}.")
    return np.stack(arrays)
