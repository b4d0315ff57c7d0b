"""Speech without end, heard in pieces by a model whose state does not grow.

It needs `pip install 'modeling-sumagg[speech]'`.
"""

from pathlib import Path

import numpy as np
import torch
from transformers import DynamicCache, PreTrainedConfig, PreTrainedModel, ProcessorMixin

from .audio import FeatureStream
from .saved_states import cache_to_tensors, read_stream, write_stream


def check_constant_state(config: PreTrainedConfig) -> None:
    """
    Raises:
        ValueError: the model does not stream, or its state grows with what it hears.
    """
    remedy = "`examples/run_speech_recognition_ctc.py` trains one that streams, runs/speech-recognition."
    if config.model_type != "sumagg_speech" or not config.is_causal:
        kind = (
            "bidirectional model" if config.model_type == "sumagg_speech" else f"model of type {config.model_type!r}"
        )
        raise ValueError(f"A {kind} needs the whole recording at once and does not stream. {remedy}")
    growing = [i for i, layer_type in enumerate(config.layer_types) if layer_type == "full_attention"]
    if growing:
        raise ValueError(
            f"Layers {growing} of the model attend to all that was heard (`layer_types`): its state grows. {remedy}"
        )


class SpeechStream:
    """
    The state of speech that arrives in pieces, in constant memory, and the words in it: each once, and never taken back.

    Args:
        model (`SumAggForCTC`): causal, without full attention.
        processor (`ProcessorMixin`): its feature extractor, without normalisation by the utterance, and its tokenizer.

    Attributes:
        cache: the model's state; `None` before the first frame.
        features: what makes frames of samples; it keeps those that wait for the rest of their frame.
        last_symbol: the most likely symbol of the last output: the same one again is not a new one.
        word: the symbols of the word that has no end yet.
        num_samples: how many samples have come, at the sampling rate of the source.
    """

    def __init__(self, model: PreTrainedModel, processor: ProcessorMixin):
        check_constant_state(model.config)
        self.model, self.tokenizer = model.eval(), processor.tokenizer
        self.features = FeatureStream(processor.feature_extractor)
        self.cache: DynamicCache | None = None
        self.last_symbol = self.tokenizer.pad_token_id
        self.word: list[int] = []
        self.num_samples = 0

    @torch.no_grad()
    def feed(self, samples: np.ndarray) -> list[str]:
        """
        Hear on.

        Args:
            samples: float32 `[samples]` at the model's sampling rate, from -1 to 1, any number of them.

        Returns:
            list[str]: the words that end in these samples.

        Raises:
            ValueError: the samples are not finite numbers of one channel.
        """
        frames = self.features.feed(samples)
        if not len(frames):
            return []
        if self.cache is None:
            self.cache = DynamicCache(config=self.model.config)
        inputs = torch.from_numpy(frames)[None].to(self.model.device, self.model.dtype)
        logits = self.model(inputs, past_key_values=self.cache, use_cache=True).logits
        words = []
        for symbol in logits[0].argmax(dim=-1).tolist():
            if symbol not in (self.last_symbol, self.tokenizer.pad_token_id):
                if symbol == self.tokenizer.word_delimiter_token_id:
                    words += self.finish()
                else:
                    self.word.append(symbol)
            self.last_symbol = symbol
        return words

    def finish(self) -> list[str]:
        """The word that has no end yet, if there is one, as the audio ends here."""
        word, self.word = self.tokenizer.decode(self.word, group_tokens=False), []
        return [word] if word else []

    def _own_tensors(self) -> dict[str, torch.Tensor]:
        return {
            "pending": torch.from_numpy(self.features.pending.copy()),
            "last_symbol": torch.tensor(self.last_symbol),
            "word": torch.tensor(self.word, dtype=torch.int64),
        }

    def tensors(self) -> dict[str, torch.Tensor]:
        """All that is kept of what was heard."""
        return {**({} if self.cache is None else cache_to_tensors(self.cache)), **self._own_tensors()}

    def save(self, path: Path) -> None:
        """Write the state as safetensors, whole or not at all."""
        write_stream(path, self.cache, self._own_tensors(), {"num_samples": self.num_samples})

    def load(self, path: Path) -> None:
        """Go on from what `save` wrote."""
        self.cache, tensors, counts = read_stream(path, self.model.config, self.model.device)
        self.num_samples = counts["num_samples"]
        self.features.pending = tensors["pending"].cpu().numpy()
        self.last_symbol, self.word = tensors["last_symbol"].item(), tensors["word"].tolist()
