"""Assisted decoding with an assistant that has another tokenizer: the tokens of greedy decoding."""

import pytest
import torch
from testing import build
from tokenizers import Tokenizer, decoders, models
from transformers import DynamicCache, GPT2Config, GPT2LMHeadModel, PreTrainedModel, PreTrainedTokenizerFast

from .kinds import CAUSAL_KINDS, greedy, marked, tiny_model


LETTERS = "abcdefghijklmnopqrstuvwxyz .,!"
PAIRS = ["ab", "bc", "cd", "ef", "fg", "hi", "ij", "kl", "lm", "ac", "bd", "ka", "no", "e ", " t"]


def tokenizer(pairs: list[str]) -> PreTrainedTokenizerFast:
    """One token a letter, or for some pairs of them."""
    vocabulary = {token: i for i, token in enumerate(["<unk>", "<pad>", *LETTERS, *pairs])}
    model = Tokenizer(models.BPE(vocab=vocabulary, merges=[(pair[0], pair[1]) for pair in pairs], unk_token="<unk>"))
    model.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=model, unk_token="<unk>", pad_token="<pad>")


def gpt2(vocab_size: int) -> PreTrainedModel:
    sizes = {"n_positions": 512, "n_embd": 16, "n_layer": 2, "n_head": 2, "eos_token_id": None}
    return build(GPT2LMHeadModel, GPT2Config(vocab_size=vocab_size, **sizes), seed=3)


def ours(kind: str):
    return lambda vocab_size: tiny_model(kind, vocab_size=vocab_size, max_position_embeddings=512)


@pytest.mark.parametrize("assistant_has_pairs", [True, False])
@pytest.mark.parametrize("roles", ["target", "assistant", "both"])
@pytest.mark.parametrize("kind", marked(CAUSAL_KINDS))
def test_another_tokenizer(kind, roles, assistant_has_pairs):
    letters, pairs = tokenizer([]), tokenizer(PAIRS)
    target_tokenizer, assistant_tokenizer = (letters, pairs) if assistant_has_pairs else (pairs, letters)
    target = (gpt2 if roles == "assistant" else ours(kind))(len(target_tokenizer))
    assistant = (gpt2 if roles == "target" else ours(kind))(len(assistant_tokenizer))
    for prompt in ("the cat, ", "kablmno"):
        ids = target_tokenizer(prompt, return_tensors="pt")["input_ids"]
        generated = target.generate(
            ids,
            max_new_tokens=16,
            do_sample=False,
            pad_token_id=1,
            assistant_model=assistant,
            tokenizer=target_tokenizer,
            assistant_tokenizer=assistant_tokenizer,
        )
        assert generated.tolist() == greedy(target, ids, 16).tolist()


@pytest.mark.parametrize("kind", marked(CAUSAL_KINDS))
@torch.no_grad()
def test_only_an_assistant_forgets_what_was_not_recorded(kind):
    """A cache of anybody else refuses to go back so far, and is never wrong."""
    model = tiny_model(kind)
    cache = DynamicCache(config=model.config)
    model(torch.ones(1, 6, dtype=torch.long), cache=cache)
    cache.activate_past_recording()
    model(torch.ones(1, 2, dtype=torch.long), cache=cache)
    with pytest.raises(ValueError, match="Cannot remove 4 tokens: 2 were recorded"):
        cache.crop(-4)
