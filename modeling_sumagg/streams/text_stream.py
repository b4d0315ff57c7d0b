"""A text without end, read in pieces by a model whose state does not grow."""

import codecs
import copy
import math
import re
from itertools import chain

import torch
from transformers import DynamicCache, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase, set_seed

from .saved_states import SavedStream


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
        ValueError: the config declares no recurrent layers, or layers whose state grows with the text, or the model is
            bidirectional, or its positions end.
    """
    recurrent = getattr(config, "recurrent_layer_types", ())
    if not recurrent:
        raise ValueError(
            f"A model of type {config.model_type!r} cannot read a stream: its config has no `recurrent_layer_types`. "
            f"{REMEDY}"
        )
    if not config.is_causal:
        raise ValueError(f"A bidirectional model needs the whole text at once and cannot read a stream. {REMEDY}")
    growing = [i for i, kind in enumerate(config.layer_types) if kind not in (*recurrent, "sliding_attention")]
    if growing:
        raise ValueError(
            f"Layers {growing} of the model attend to the whole text (`layer_types`): its state grows with every token. "
            f"{REMEDY}"
        )
    limit = getattr(config, "max_position_embeddings", None)
    if limit is not None:
        raise ValueError(
            f"The model has learned parameters for {limit} positions (`max_position_embeddings`) and reads no more "
            f"tokens. {REMEDY}"
        )


class TextStream(SavedStream):
    """
    The state of a text that arrives in pieces, in constant memory: it can be scored, continued, saved and resumed.

    Args:
        model (`PreTrainedModel`): a causal language model with a state of constant size and positions without end.
        tokenizer (`PreTrainedTokenizerBase`): its byte-level BPE.

    Attributes:
        cache (`DynamicCache | None`): the decode state after the blocks of tokens so far; `None` before the first.
        pending (`list[int]`): the token ids that do not fill a block yet, at most `BLOCK_TOKENS` of them.
        held (`str`): the end of the text, which waits for the rest of its last word.
        num_bytes, num_tokens (`int`): the number of bytes read, and of tokens made of them, `bos` included.
        loss, num_scored (`float`, `int`): the sum of the negative log probabilities of the tokens in blocks, in nats, and
            their number.

    Raises:
        `ValueError`: as [`check_constant_state`].
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
        """
        Read the next piece of the text.

        Args:
            data (`bytes`): UTF-8, cut anywhere; bytes that are none are replaced by U+FFFD.
            final (`bool`, defaults to `False`): whether the text ends here, so that its last word is whole.
        """
        self.num_bytes += len(data)
        self.held += self.decoder.decode(data, final)
        words = list(WORD.finditer(self.held))
        if not final and words:
            # The last one may be longer.
            words.pop()
        end = words[-1].end() if words else 0
        pieces = [word.group() for word in words]
        if final and self.held[end:]:
            pieces.append(self.held[end:])
            end = len(self.held)
        self.held = self.held[end:]
        new = self._tokenize(pieces)
        self.num_tokens += len(new)
        tokens, start = self.pending + new, 0
        while len(tokens) - start > BLOCK_TOKENS:
            if self.cache is None:
                self.cache = DynamicCache(config=self.model.config)
            self.loss += self._loss(tokens[start : start + BLOCK_TOKENS + 1], self.cache)
            self.num_scored += BLOCK_TOKENS
            start += BLOCK_TOKENS
        self.pending = tokens[start:]

    def _tokenize(self, pieces: list[str]) -> list[int]:
        # Word by word: the tokens cannot depend on where the chunks ended.
        if not pieces:
            return []
        return list(chain.from_iterable(self.tokenizer(pieces, add_special_tokens=False)["input_ids"]))

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
        if not num_scored:
            return math.nan
        # Infinity, where `math.exp` raises.
        return torch.tensor(loss / num_scored, dtype=torch.float64).exp().item()

    def continuation(self, max_new_tokens: int, seed: int, **options) -> list[int]:
        """
        Write the next tokens after the text so far, the text held back included. The state does not change.

        Args:
            max_new_tokens (`int`): the most tokens to write.
            seed (`int`): of the sampling; the number of tokens read is added to it.
            options: for `generate`.

        Returns:
            `list[int]`: the token ids; none before the first token was read.
        """
        tokens = self.pending + self._tokenize([self.held] if self.held else [])
        if not tokens:
            return []
        cache = self._copy()
        past = int(cache.get_seq_length())
        # NumPy's generator takes 32 bits.
        set_seed((seed + self.num_tokens) % 2**32)
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

    def own_state(self) -> tuple[dict[str, torch.Tensor], dict[str, int]]:
        text = self.held.encode() + self.decoder.getstate()[0]
        tensors = {
            "pending": torch.tensor(self.pending, dtype=torch.int64),
            "held": torch.tensor(list(text), dtype=torch.uint8),
            "loss": torch.tensor(self.loss, dtype=torch.float64),
        }
        return tensors, {"num_bytes": self.num_bytes, "num_tokens": self.num_tokens, "num_scored": self.num_scored}

    def restore(self, cache: DynamicCache | None, tensors: dict[str, torch.Tensor], counts: dict[str, int]) -> None:
        pending, num_scored = tensors["pending"].tolist(), counts["num_scored"]
        vocab_size, length = self.model.config.vocab_size, 0 if cache is None else int(cache.get_seq_length())
        if not all(0 <= token < vocab_size for token in pending) or len(pending) > BLOCK_TOKENS:
            raise ValueError(f"`pending` must be at most {BLOCK_TOKENS} ids below {vocab_size}, got {pending[:5]}")
        if (length, length + len(pending)) != (num_scored, counts["num_tokens"]):
            raise ValueError(
                f"its decode state has {length} tokens and {len(pending)} are pending, but it counts {num_scored} scored "
                f"of {counts['num_tokens']}"
            )
        self.cache, self.pending, self.loss = cache, pending, tensors["loss"].item()
        self.decoder.reset()
        self.held = self.decoder.decode(bytes(tensors["held"].tolist()))
        self.num_bytes, self.num_tokens, self.num_scored = counts["num_bytes"], counts["num_tokens"], num_scored


__all__ = ["TextStream", "check_constant_state"]
