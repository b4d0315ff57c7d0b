"""A row that ends early in a batch, and what is done with the cache after: each row goes on as it does alone."""

import copy
import pickle

import pytest
import torch
from transformers import DynamicCache, StaticCache, set_seed

from modeling_sumagg.common.compatibility import CACHE_NAME, find_cache

from .kinds import MAIN_KINDS, VOCAB_SIZE, greedy_alone, logits_alone, tiny_model


PAD = 0
NEW_TOKENS = 6
# Sums beside full attention, beside both kinds of attention, and token statistics alone.
FEW_KINDS = ["sumagg-decayed-hybrid", "sumagg-sliding-full", "tost-pure"]
PROMPTS = [(5, 9, 2, 30, 7, 7), (3, 4, 11, 12, 13, 14), (1, 2, 8, 6, 9, 10)]
TURN = [(6, 21, 6), (8, 9, 10), (4, 4, 17)]


def ending_early(model, prompts) -> int:
    """A token that ends one of the rows at least two tokens before another."""
    rows = [greedy_alone(model, tuple(prompt), NEW_TOKENS) for prompt in prompts]
    for token in range(1, VOCAB_SIZE):
        ends = [row.index(token) if token in row else NEW_TOKENS for row in rows]
        if max(ends) > min(ends) + 2:
            return token
    pytest.fail("no token ends one row early and another late: choose other prompts")


def real_tokens(sequences: torch.Tensor, length: int, eos_token_id: int) -> torch.Tensor:
    """The mask `[B, T]` of sequences whose prompts have a `length`: nothing is real after the token that ends a row."""
    mask = torch.ones_like(sequences)
    for row, tokens in enumerate(sequences.tolist()):
        if eos_token_id in tokens[length:]:
            mask[row, tokens.index(eos_token_id, length) + 1 :] = 0
    return mask


def assert_goes_on(model, first, mask: torch.Tensor, turn=TURN, **options) -> None:
    """The next turn of every row is what greedy decoding writes after the row alone."""
    history = torch.cat([first.sequences, torch.tensor(turn)], dim=1)
    mask = torch.cat([mask, torch.ones(len(turn), len(turn[0]), dtype=mask.dtype)], dim=1)
    cache = {CACHE_NAME: find_cache(first)}
    second = model.generate(history, attention_mask=mask, max_new_tokens=4, do_sample=False, **cache, **options)
    for row, tokens in enumerate(second[:, history.shape[1] :].tolist()):
        assert tokens == greedy_alone(model, tuple(history[row][mask[row].bool()].tolist()), 4)


MODES = {
    "dynamic": {},
    "static": {"cache_implementation": "static", "max_cache_len": 40},
    "chunked prefill": {"prefill_chunk_size": 4},
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", MAIN_KINDS)
def test_the_next_turn_of_a_batch_in_which_a_row_has_ended(kind, mode):
    model = tiny_model(kind)
    eos_token_id = ending_early(model, PROMPTS)
    options = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "return_dict_in_generate": True, "pad_token_id": PAD}
    first = model.generate(torch.tensor(PROMPTS), eos_token_id=eos_token_id, **options, **MODES[mode])
    mask = real_tokens(first.sequences, 6, eos_token_id)
    assert 0 < (mask == 0).sum() and mask[:, -1].any()
    assert_goes_on(model, first, mask, pad_token_id=PAD)


@pytest.mark.parametrize("kind", FEW_KINDS)
def test_three_turns_of_a_padded_batch_with_a_cache_of_the_users(kind):
    model = tiny_model(kind)
    cache = DynamicCache(config=model.config)
    sequences = torch.tensor(PROMPTS)
    mask = torch.tensor([[1] * 6, [0, 0, 1, 1, 1, 1], [1, 1, 0, 1, 1, 0]])
    eos_token_id = ending_early(model, [sequences[row][mask[row].bool()].tolist() for row in range(3)])
    ended = 0
    for turn in (TURN, TURN[::-1], TURN):
        length = sequences.shape[1]
        expected = [
            greedy_alone(model, tuple(row[real.bool()].tolist()), NEW_TOKENS)
            for row, real in zip(sequences, mask, strict=True)
        ]
        sequences = model.generate(
            sequences,
            attention_mask=mask,
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            eos_token_id=eos_token_id,
            pad_token_id=PAD,
            **{CACHE_NAME: cache},
        )
        new = real_tokens(sequences, length, eos_token_id)[:, length:]
        for row, tokens, real in zip(expected, sequences[:, length:], new, strict=True):
            assert tokens[real.bool()].tolist() == row[: int(real.sum())]
        ended += int((new == 0).sum())
        sequences = torch.cat([sequences, torch.tensor(turn)], dim=1)
        mask = torch.cat([mask, new, torch.ones(3, 3, dtype=torch.long)], dim=1)
    assert ended > 0


@pytest.mark.parametrize("kind", ["sumagg-decayed-hybrid", "tost-pure"])
@pytest.mark.parametrize("options", [{}, {"cache_implementation": "static", "max_cache_len": 40}], ids=str)
def test_samples_that_end_at_different_times(kind, options):
    model = tiny_model(kind)
    set_seed(3)
    first = model.generate(
        torch.tensor(PROMPTS[:1]),
        do_sample=True,
        num_return_sequences=3,
        max_new_tokens=20,
        eos_token_id=[1, 2, 3, 4, 5],
        pad_token_id=PAD,
        return_dict_in_generate=True,
        **options,
    )
    mask = torch.ones_like(first.sequences)
    for row, tokens in enumerate(first.sequences.tolist()):
        ends = [i + 1 for i, token in enumerate(tokens) if i >= 6 and 1 <= token <= 5]
        mask[row, ends[0] if ends else len(tokens) :] = 0
    assert (mask == 0).any()
    assert_goes_on(model, first, mask, pad_token_id=PAD)


@pytest.mark.parametrize("kind", MAIN_KINDS)
def test_the_state_of_a_row_that_has_ended_does_not_move(kind):
    model = tiny_model(kind)
    eos_token_id = ending_early(model, PROMPTS)
    first = model.generate(
        torch.tensor(PROMPTS),
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        eos_token_id=eos_token_id,
        pad_token_id=PAD,
        return_dict_in_generate=True,
    )
    mask = real_tokens(first.sequences, 6, eos_token_id).bool()
    row = int(mask.sum(dim=1).argmin())
    alone = DynamicCache(config=model.config)
    with torch.no_grad():
        model(first.sequences[row][mask[row]][None], **{CACHE_NAME: alone})
    compared = 0
    for layer, own in zip(find_cache(first).layers, alone.layers, strict=True):
        for name in getattr(own, "states", {}).keys() - {"append_columns"}:
            for actual, expected in zip(layer.states[name], own.states[name], strict=True):
                torch.testing.assert_close(actual[row], expected[0], rtol=1e-5, atol=1e-5)
                compared += 1
    assert compared


@pytest.mark.parametrize("kind", FEW_KINDS)
def test_a_mask_that_contradicts_what_the_state_has_seen_is_refused(kind):
    model = tiny_model(kind)
    for cache in (DynamicCache(config=model.config), StaticCache(config=model.config, max_cache_len=24)):
        with torch.no_grad():
            model(torch.tensor(PROMPTS), **{CACHE_NAME: cache})
        mask = torch.ones(3, 9, dtype=torch.long)
        mask[1, 4] = 0
        with pytest.raises(ValueError, match="`attention_mask` says otherwise than before"):
            model(torch.tensor(TURN), attention_mask=mask, **{CACHE_NAME: copy.deepcopy(cache)})
        # The cache is as it was, and goes on with the right mask, or with none.
        for own in (torch.ones(3, 9), None):
            with torch.no_grad():
                logits = model(torch.tensor(TURN), attention_mask=own, **{CACHE_NAME: copy.deepcopy(cache)}).logits
            expected = logits_alone(model, [*PROMPTS[1], *TURN[1]])[-3:]
            torch.testing.assert_close(logits[1], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", FEW_KINDS)
@pytest.mark.parametrize("static", [False, True])
@torch.no_grad()
def test_without_a_mask_the_padding_in_a_cache_stays_padding(kind, static):
    model = tiny_model(kind)
    cache = StaticCache(config=model.config, max_cache_len=24) if static else DynamicCache(config=model.config)
    mask = torch.tensor([[1] * 6, [0, 0, 1, 1, 1, 1], [1, 1, 0, 1, 1, 0]])
    model(torch.tensor(PROMPTS), attention_mask=mask, **{CACHE_NAME: cache})
    cache = pickle.loads(pickle.dumps(cache))
    cache.reorder_cache(torch.tensor([2, 0, 1]))
    logits = [model(torch.tensor(TURN)[:, :1], **{CACHE_NAME: cache}).logits]
    logits.append(model(torch.tensor(TURN)[:, 1:], **{CACHE_NAME: cache}).logits)
    for turn, row, own in zip(TURN, [2, 0, 1], torch.cat(logits, dim=1), strict=True):
        prompt = [token for token, real in zip(PROMPTS[row], mask[row].tolist(), strict=True) if real]
        torch.testing.assert_close(own, logits_alone(model, [*prompt, *turn])[-3:], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", FEW_KINDS)
def test_a_row_without_a_new_token_is_refused_in_the_next_turn(kind):
    model = tiny_model(kind)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(torch.tensor(PROMPTS), **{CACHE_NAME: cache})
    history = torch.tensor([[*prompt, *turn] for prompt, turn in zip(PROMPTS, TURN, strict=True)])
    mask = torch.ones_like(history)
    mask[1, 6:] = 0
    with pytest.raises(ValueError, match="pass a token for each row"):
        model.generate(history, attention_mask=mask, max_new_tokens=2, **{CACHE_NAME: cache})


@pytest.mark.parametrize("kind", FEW_KINDS)
def test_the_beams_that_are_left_are_not_gone_on_from(kind):
    model = tiny_model(kind)
    options = {"max_new_tokens": 4, "num_beams": 3, "num_return_sequences": 3, "do_sample": False}
    first = model.generate(torch.tensor(PROMPTS[:1]), return_dict_in_generate=True, **options)
    history = torch.cat([first.sequences, torch.tensor(TURN)], dim=1)
    cache = find_cache(first)
    with pytest.raises(ValueError, match="beams that beam search was left with"):
        model.generate(history, max_new_tokens=2, **{CACHE_NAME: cache})
    if "full_attention" not in model.config.layer_types:
        cache.reset()
        generated = model.generate(torch.tensor(PROMPTS[:1]), max_new_tokens=2, do_sample=False, **{CACHE_NAME: cache})
        assert generated[0, 6:].tolist() == greedy_alone(model, PROMPTS[0], 2)


@pytest.mark.parametrize("kind", FEW_KINDS)
def test_a_mask_that_fits_neither_the_input_nor_all_tokens_is_refused(kind):
    model = tiny_model(kind)
    for options in ({}, {"cache_implementation": "static"}):
        with pytest.raises(ValueError, match="`attention_mask` has 9 columns, and there are 6 tokens in the input"):
            model.generate(
                torch.tensor(PROMPTS), attention_mask=torch.tensor([[0] + [1] * 8] * 3), max_new_tokens=2, **options
            )
