"""Speech without end, heard in pieces by a model whose state does not grow.

It needs `pip install 'modeling-sumagg[speech]'`.
"""

import numpy as np
import torch
from transformers import DynamicCache, PreTrainedModel, ProcessorMixin

from .audio import FeatureStream
from .saved_states import SavedStream, cache_to_tensors


# The most symbols of a word. Noise, and languages without spaces, may have no end of a word for hours.
WORD_SYMBOLS = 100


def check_constant_state(model: PreTrainedModel) -> None:
    """
    Raises:
        ValueError: the model does not stream, or its state grows with the audio.
    """
    if getattr(model, "can_stream", False):
        return
    remedy = "`examples/run_speech_recognition_ctc.py` trains one that streams, runs/speech-recognition."
    config = model.config
    if not getattr(model, "input_modalities", ()) == ("audio",):
        raise ValueError(f"A model of type {config.model_type!r} cannot hear a stream of audio. {remedy}")
    growing = [i for i, layer_type in enumerate(config.layer_types) if layer_type == "full_attention"]
    if config.is_causal and growing:
        raise ValueError(
            f"Layers {growing} of the model attend to the whole audio (`layer_types`): its state grows. {remedy}"
        )
    kind = "bidirectional model" if not config.is_causal else type(model).__name__
    raise ValueError(f"A {kind} needs the whole recording at once and cannot hear a stream. {remedy}")


class SpeechStream(SavedStream):
    """
    The state of speech that arrives in pieces, in constant memory, and the words in it: each once, and never taken back.

    Args:
        model (`SumAggForCTC`): causal, without full attention.
        processor (`ProcessorMixin`): its feature extractor, without normalisation by the utterance, and its tokenizer.

    Attributes:
        cache (`DynamicCache | None`): the model's state; `None` before the first frame.
        features (`FeatureStream`): makes frames of samples; it keeps the samples of the frame that is not complete.
        last_symbol (`int`): the most likely symbol of the last output: the same one again is not a new one.
        word (`list[int]`): the symbols of the word that has no end yet, at most `WORD_SYMBOLS`.
        num_samples (`int`): the number of samples heard.

    Raises:
        `ValueError`: as [`check_constant_state`] and [`FeatureStream`].
    """

    def __init__(self, model: PreTrainedModel, processor: ProcessorMixin):
        check_constant_state(model)
        self.model, self.tokenizer = model.eval(), processor.tokenizer
        self.features = FeatureStream(processor.feature_extractor)
        self.cache: DynamicCache | None = None
        self.last_symbol = self.tokenizer.pad_token_id
        self.word: list[int] = []
        self.num_samples = 0

    @torch.no_grad()
    def feed(self, samples: np.ndarray) -> list[str]:
        """
        Hear the next piece of the audio.

        Args:
            samples (`np.ndarray`): float32 `[samples]` at the model's sampling rate, from -1 to 1, any number of them.

        Returns:
            `list[str]`: the words that end in these samples. A word of more than `WORD_SYMBOLS` symbols is returned in
            pieces of so many.

        Raises:
            `ValueError`: the samples are not finite numbers of one channel. The stream is unchanged.
        """
        frames = self.features.feed(samples)
        self.num_samples += len(samples)
        if not len(frames):
            return []
        if self.cache is None:
            self.cache = DynamicCache(config=self.model.config)
        # In float32 whatever the model's dtype: it rounds them after it has standardised them.
        inputs = torch.from_numpy(frames)[None].to(self.model.device)
        logits = self.model(inputs, past_key_values=self.cache, use_cache=True).logits
        words = []
        for symbol in logits[0].argmax(dim=-1).tolist():
            if symbol not in (self.last_symbol, self.tokenizer.pad_token_id):
                if symbol == self.tokenizer.word_delimiter_token_id:
                    words += self.finish()
                else:
                    words += self.finish() if len(self.word) == WORD_SYMBOLS else []
                    self.word.append(symbol)
            self.last_symbol = symbol
        return words

    def finish(self) -> list[str]:
        """The word that has no end yet, if there is one, as the audio ends here."""
        word, self.word = self.tokenizer.decode(self.word, group_tokens=False), []
        return [word] if word else []

    def own_state(self) -> tuple[dict[str, torch.Tensor], dict[str, int]]:
        # The blank is in no word. With it, the state has the same size whatever is being said.
        word = [*self.word, *[self.tokenizer.pad_token_id] * (WORD_SYMBOLS - len(self.word))]
        tensors = {
            "pending": torch.from_numpy(self.features.pending.copy()),
            "last_symbol": torch.tensor(self.last_symbol),
            "word": torch.tensor(word, dtype=torch.int64),
        }
        return tensors, {"num_samples": self.num_samples}

    def tensors(self) -> dict[str, torch.Tensor]:
        """Every tensor of the state."""
        return {**({} if self.cache is None else cache_to_tensors(self.cache)), **self.own_state()[0]}

    def restore(self, cache: DynamicCache | None, tensors: dict[str, torch.Tensor], counts: dict[str, int]) -> None:
        pending, last_symbol, word = (tensors[name] for name in ("pending", "last_symbol", "word"))
        frames, hop = 0 if cache is None else int(cache.get_seq_length()), self.features.hop
        tokens = 0 if cache is None else int(cache.get_seq_length(1))
        if (
            len(pending) >= self.features.length
            or frames * hop + len(pending) != counts["num_samples"]
            or tokens != frames // self.model.config.subsampling_factor
        ):
            raise ValueError(
                f"its decode state has {frames} frames and {tokens} tokens, {len(pending)} samples are pending, and it "
                f"counts {counts['num_samples']} samples"
            )
        symbols, vocab_size = [last_symbol.item(), *word.tolist()], self.model.config.vocab_size
        if len(word) != WORD_SYMBOLS or not all(0 <= symbol < vocab_size for symbol in symbols):
            raise ValueError(f"`word` must be {WORD_SYMBOLS} symbols, and each symbol below {vocab_size}")
        self.cache, self.num_samples = cache, counts["num_samples"]
        self.features.pending = pending.numpy()
        self.last_symbol = last_symbol.item()
        self.word = [symbol for symbol in word.tolist() if symbol != self.tokenizer.pad_token_id]


__all__ = ["WORD_SYMBOLS", "SpeechStream", "check_constant_state"]
