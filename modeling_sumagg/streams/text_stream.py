"""A text without end, read in pieces by a model whose state does not grow."""

import codecs
import copy
import math
import re
from pathlib import Path

import torch
from transformers import DynamicCache, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase, set_seed

from .saved_states import read_stream, write_stream


# Tokens enter the state in blocks that are counted from the beginning of the stream, so that every rounding, and with
# it every later token, is the same however the text arrives.
BLOCK_TOKENS = 64
# A word with the spaces before it: no byte-level BPE merges across the change from a non-space to a space. What has no
# such change for long is cut by length, so that little text ever waits.
WORD = re.compile(r"\s{1000}|\s{0,999}\S{1,1000}")


# A model that fits.
REMEDY = "`python examples/quickstart.py` trains a model that has neither limit, runs/quickstart."


def check_constant_state(config: PreTrainedConfig) -> None:
    """
    Raises:
        ValueError: the state of such a model grows with the text, or its positions end.
    """
    if config.model_type not in ("sumagg", "tost_text"):
        raise ValueError(f"A model of type {config.model_type!r} has no state of constant size. {REMEDY}")
    growing = [i for i, layer_type in enumerate(config.layer_types) if layer_type == "full_attention"]
    if growing:
        raise ValueError(
            f"Layers {growing} of the model attend to the whole text (`layer_types`): its state grows with every token. "
            f"{REMEDY}"
        )
    if config.position_embedding_type == "learned" or getattr(config, "use_membership_bias", False):
        table = "use_membership_bias=True" if config.position_embedding_type != "learned" else "learned positions"
        raise ValueError(
            f"The model has a table that ends after {config.max_position_embeddings} tokens ({table}). {REMEDY}"
        )


class TextStream:
    """
    The state of a text that arrives in pieces, in constant memory: it can be scored, gone on with, saved and resumed.

    Args:
        model (`PreTrainedModel`): a causal language model with a state of constant size and positions without end.
        tokenizer (`PreTrainedTokenizerBase`): its byte-level BPE.

    Attributes:
        cache: the decode state after the blocks of tokens so far; `None` before the first.
        pending: the token ids that do not fill a block yet, at most `BLOCK_TOKENS` of them.
        held: the end of the text, which waits for the rest of its last word.
        num_bytes, num_tokens: what has been read and tokenized.
        loss, num_scored: the sum of the negative log probabilities of the tokens in blocks, and their number.

    Raises:
        `ValueError`: the state of such a model grows with the text, or its positions end.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase):
        check_constant_state(model.config)
        self.model, self.tokenizer = model.eval(), tokenizer
        self.cache: DynamicCache | None = None
        self.pending: list[int] = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
        self.decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self.held = ""
        self.num_bytes = 0
        self.num_tokens = len(self.pending)
        self.loss, self.num_scored = 0.0, 0

    def feed(self, data: bytes, final: bool = False) -> None:
        """Read on; `final` says that the text ends here and its last word is whole."""
        self.num_bytes += len(data)
        self.held += self.decoder.decode(data, final)
        words = list(WORD.finditer(self.held))
        if not final and words:
            # The last one may go on.
            words.pop()
        end = words[-1].end() if words else 0
        pieces = [word.group() for word in words]
        if final and self.held[end:]:
            pieces.append(self.held[end:])
            end = len(self.held)
        self.held = self.held[end:]
        tokens = self._tokenize(pieces)
        self.num_tokens += len(tokens)
        self.pending += tokens
        while len(self.pending) > BLOCK_TOKENS:
            if self.cache is None:
                self.cache = DynamicCache(config=self.model.config)
            self.loss += self._loss(self.pending[: BLOCK_TOKENS + 1], self.cache)
            self.num_scored += BLOCK_TOKENS
            del self.pending[:BLOCK_TOKENS]

    def _tokenize(self, pieces: list[str]) -> list[int]:
        # Word by word: the tokens cannot depend on where the chunks ended.
        if not pieces:
            return []
        return sum(self.tokenizer(pieces, add_special_tokens=False)["input_ids"], [])

    @torch.no_grad()
    def _loss(self, tokens: list[int], cache: DynamicCache) -> float:
        """Feed all tokens but the last to the cache; the summed loss of all but the first."""
        ids = torch.tensor([tokens], device=self.model.device)
        logits = self.model(ids[:, :-1], past_key_values=cache).logits[0].float()
        return torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum").item()

    def _copy(self) -> DynamicCache:
        return DynamicCache(config=self.model.config) if self.cache is None else copy.deepcopy(self.cache)

    def perplexity(self) -> float:
        """Of every token so far but the first, which nothing predicts; `nan` before there is one."""
        loss, num_scored = self.loss, self.num_scored
        if len(self.pending) > 1:
            loss += self._loss(self.pending, self._copy())
            num_scored += len(self.pending) - 1
        return math.exp(loss / num_scored) if num_scored else math.nan

    def continuation(self, max_new_tokens: int, seed: int, **options) -> list[int]:
        """The tokens that the model writes next, the text held back included; the state stays as it is."""
        tokens = self.pending + self._tokenize([self.held] if self.held else [])
        if not tokens:
            return []
        cache = self._copy()
        past = int(cache.get_seq_length())
        set_seed(seed + self.num_tokens)
        generated = self.model.generate(
            torch.tensor([tokens], device=self.model.device),
            # No bytes are held for the mask of the text so far.
            attention_mask=torch.ones(1, 1, dtype=torch.bool, device=self.model.device).expand(1, past + len(tokens)),
            position_ids=torch.arange(past, past + len(tokens), device=self.model.device)[None],
            past_key_values=cache,
            max_new_tokens=max_new_tokens,
            **options,
        )
        return generated[0, len(tokens) :].tolist()

    def save(self, path: Path) -> None:
        """Write the state as safetensors, whole or not at all."""
        text = self.held.encode() + self.decoder.getstate()[0]
        tensors = {
            "pending": torch.tensor(self.pending, dtype=torch.int64),
            "held": torch.tensor(list(text), dtype=torch.uint8),
            "loss": torch.tensor(self.loss, dtype=torch.float64),
        }
        counts = {"num_bytes": self.num_bytes, "num_tokens": self.num_tokens, "num_scored": self.num_scored}
        write_stream(path, self.cache, tensors, counts)

    def load(self, path: Path) -> None:
        """Go on from what `save` wrote."""
        self.cache, tensors, counts = read_stream(path, self.model.config, self.model.device)
        self.pending, self.loss = tensors["pending"].tolist(), tensors["loss"].item()
        self.decoder.reset()
        self.held = self.decoder.decode(bytes(tensors["held"].tolist()))
        self.num_bytes, self.num_tokens, self.num_scored = (
            counts[name] for name in ("num_bytes", "num_tokens", "num_scored")
        )
