"""The models for speech: against plain loops in float64, whole and in pieces, padded and alone."""

import copy
import itertools
import pickle
import random

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from testing import assert_close, build, cache_tensors, speech_config, speech_processor, sumagg_config
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCTC, DynamicCache, Trainer, TrainingArguments

from modeling_sumagg import SumAggForAudioClassification, SumAggForCausalLM, SumAggForCTC, SumAggSpeechModel
from modeling_sumagg.configuration import preset_path
from modeling_sumagg.streams.saved_states import cache_from_tensors, cache_to_tensors


STATISTICS = {"feature_mean": [3.0, -1.0, 0.5, 2.0, 9.0], "feature_std": [2.0, 0.5, 1.0, 3.0, 4.0]}
KINDS = {
    "decayed": {"layers": "pure", **STATISTICS},
    "convolution": {"layers": "pure", "conv_kernel_size": 3},
    "sliding": {"layers": "sliding"},
    "sliding first": {"layers": "pure", "layer_types": ["sliding_attention", "summation"], "sum_decay": "learned"},
    "published": {"layers": "pure", "sum_decay": "none", "sum_gate": False, "norm_position": "post"},
    "groups of three": {"layers": "pure", "subsampling_factor": 3, "subsampling_kernel_size": 3},
}
FRAMES = 150
PIECES = {"1": 1, "7": 7, "64": 64, "random": None}


def tiny(kind: str = "decayed", model_class=SumAggForCTC, **changes):
    return build(model_class, speech_config(**{**KINDS[kind], **changes}))


def frames(batch_size: int = 2, length: int = FRAMES, seed: int = 0) -> torch.Tensor:
    return torch.randn(batch_size, length, 5, generator=torch.Generator().manual_seed(seed)) * 3


def pieces(length: int, size: int | None) -> list[int]:
    """Lengths of pieces, all of a size or random ones, none at all among them."""
    if size is not None:
        return [size] * (length // size) + [length % size]
    draw, lengths = random.Random(0), []
    while sum(lengths) < length:
        lengths.append(min(draw.choice([0, 1, 2, 3, 5, 8, 13, 30]), length - sum(lengths)))
    return lengths


@torch.no_grad()
def stream(model, x, size, mask=None, cache=None) -> tuple[list[torch.Tensor], DynamicCache]:
    """The logits of the tokens of each row, heard in pieces, and the cache after them."""
    cache, rows, end = cache or DynamicCache(config=model.config), [[] for _ in x], 0
    for length in pieces(x.shape[1], size):
        start, end = end, end + length
        outputs = model(x[:, start:end], None if mask is None else mask[:, :end], cache=cache)
        assert outputs.cache is cache
        for row, logits, real in zip(rows, outputs.logits, outputs.token_mask, strict=True):
            row.append(logits[real.bool()])
    return [torch.cat(row) for row in rows], cache


@pytest.mark.parametrize("size", PIECES.values(), ids=PIECES)
@pytest.mark.parametrize("kind", KINDS)
def test_pieces_give_what_the_whole_gives(kind, size):
    model, x = tiny(kind), frames()
    with torch.no_grad():
        whole = model(x).logits
    assert whole.shape[1] == FRAMES // model.config.subsampling_factor
    for row, expected in zip(stream(model, x, size)[0], whole, strict=True):
        assert_close(row, expected)
        assert torch.equal(row.argmax(-1), expected.argmax(-1))


def padded(x: torch.Tensor, side: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Padding of NaN in the second of three rows: 33 frames; and all but 3 of the third."""
    mask = torch.ones(x.shape[:2], dtype=torch.long)
    places = {"left": range(33), "right": range(FRAMES - 33, FRAMES), "inside": range(5, FRAMES, 4)}
    mask[1, list(places[side])] = 0
    mask[2] = 0
    mask[2, 10:13] = 1
    return x.masked_fill(mask[..., None] == 0, float("nan")), mask


@pytest.mark.parametrize("side", ["left", "right", "inside"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_padded_row_is_what_it_is_alone(kind, side):
    model = tiny(kind, pad_token_id=4)
    x, mask = padded(frames(3), side)
    with torch.no_grad():
        outputs = model(x, mask)
        alone = [model(row[real.bool()][None]).logits[0] for row, real in zip(x, mask, strict=True)]
    lengths = [len(logits) for logits in alone]
    assert outputs.token_mask.tolist() == [[1] * n + [0] * (max(lengths) - n) for n in lengths]
    lengths_of_frames = model._get_feat_extract_output_lengths(mask.sum(dim=1))
    assert lengths_of_frames.tolist() == lengths
    for row, expected in zip(outputs.logits, alone, strict=True):
        assert_close(row[: len(expected)], expected)
        # After its last token a row predicts the blank, so that greedy decoding finds no other text.
        assert (row[len(expected) :].argmax(-1) == 4).all()
    for size in (7, None):
        for row, expected in zip(stream(model, x, size, mask)[0], alone, strict=True):
            assert_close(row, expected)


def reference(model: SumAggForCTC, x: torch.Tensor) -> torch.Tensor:
    """The logits of one recording `[T, F]`, frame by frame and token by token, in float64."""
    model, config = copy.deepcopy(model).double(), model.config
    mean, std = (torch.tensor(values).double() for values in (config.feature_mean, config.feature_std))
    x = (x.double() - mean) / std
    front, size, logits = model.model.embeddings, config.subsampling_kernel_size, []
    heads, states = config.num_sum_heads, [(0.0, 0.0)] * config.num_hidden_layers
    for end in range(config.subsampling_factor, len(x) + 1, config.subsampling_factor):
        zeros = torch.zeros(max(size - end, 0), x.shape[1], dtype=torch.float64)
        window = torch.cat([zeros, x[max(end - size, 0) : end]]).flatten()
        h = front.token_proj(F.gelu(front.frames_proj(window)))
        for index, layer in enumerate(model.model.layers):
            mixer, u = layer.mixer, layer.mixer_norm(h)
            z = mixer.hidden_proj(mixer.in_proj(u).relu()).relu().view(heads, -1)
            decay = (mixer.decay.proj(u) + mixer.decay.logit).sigmoid()[:, None]
            total, weight = states[index]
            states[index] = total, weight = decay * total + (1 - decay) * z, decay * weight + (1 - decay)
            h = h + mixer.out_proj((total / weight).flatten() * F.silu(mixer.gate_proj(u)))
            h = h + layer.mlp.down_proj(F.gelu(layer.mlp.up_proj(layer.mlp_norm(h))))
        logits.append(model.lm_head(model.model.norm(h)))
    return torch.stack(logits)


def test_logits_are_those_of_a_loop_in_float64():
    model, x = tiny(), frames(1)
    with torch.no_grad():
        assert_close(model.double()(x.double()).logits[0], reference(model, x[0]), rtol=1e-11)
        assert_close(model.float()(x).logits[0].double(), reference(model, x[0]), rtol=1e-5)


def losses_of_all_paths(logits: torch.Tensor, labels: list[int], blank: int) -> float:
    """The probability of labels, as the sum of those of all sequences of symbols that stand for them."""
    probabilities, total = logits.double().softmax(-1), 0.0
    for path in itertools.product(range(logits.shape[1]), repeat=len(logits)):
        if [symbol for symbol, _ in itertools.groupby(path) if symbol != blank] == labels:
            total += torch.stack([probabilities[t, symbol] for t, symbol in enumerate(path)]).prod().item()
    return -torch.tensor(total, dtype=torch.float64).log().item()


@pytest.mark.parametrize("blank", [0, 2])
@pytest.mark.parametrize("side", ["left", "right"])
def test_the_loss_is_that_of_all_paths(side, blank):
    x, lengths, symbols = frames(3, 24), [24, 17, 13], [symbol for symbol in range(3) if symbol != blank]
    spelled = [[symbols[0], symbols[0], symbols[1]], [symbols[1]], []]
    mask = torch.stack([torch.arange(24) < length for length in lengths]).long()
    mask = mask.flip(1) if side == "left" else mask
    labels = torch.tensor([row + [-100] * (3 - len(row)) for row in spelled])
    model = tiny(vocab_size=3, pad_token_id=blank)
    alone = [model(row[real.bool()][None]).logits[0] for row, real in zip(x, mask, strict=True)]
    losses = [losses_of_all_paths(logits, row, blank) for logits, row in zip(alone, spelled, strict=True)]
    for reduction, expected in (
        ("sum", sum(losses)),
        ("mean", sum(loss / max(len(row), 1) for loss, row in zip(losses, spelled, strict=True)) / 3),
    ):
        model.config.ctc_loss_reduction = reduction
        assert model(x, mask, labels=labels).loss.item() == pytest.approx(expected, rel=1e-5)


def test_audio_that_is_too_short_for_its_labels():
    model, labels = tiny(), torch.tensor([[5, 6, 7], [5, 6, 7]])
    x, mask = frames(2, 40), torch.ones(2, 40, dtype=torch.long)
    mask[1, 8:] = 0
    assert model(x, mask, labels=labels).loss == float("inf")
    model.config.ctc_zero_infinity = True
    assert_close(2 * model(x, mask, labels=labels).loss, model(x[:1], labels=labels[:1]).loss)
    # No token at all.
    assert model(x[:, :3], labels=labels).loss == 0
    assert model(x[:, :3], labels=torch.full((2, 0), 5)).loss == 0


def test_a_bidirectional_model_hears_both_sides_and_padding_on_neither():
    model, x = tiny(is_causal=False), frames(3)
    later = x.clone()
    later[:, -4:] += 1
    with torch.no_grad():
        assert not torch.allclose(model(x).logits[:, 0], model(later).logits[:, 0])
        x, mask = padded(x, "left")
        outputs = model(x, mask)
        assert_close(outputs.logits[1, :29], model(x[1:2, 33:]).logits[0])
    assert outputs.cache is None and not model.can_stream
    with pytest.raises(ValueError, match="bidirectional model has no decode state"):
        model(frames(1), cache=DynamicCache(config=model.config))


def test_full_attention_is_for_whole_recordings():
    model = tiny(layer_types=["summation", "full_attention"])
    x, mask = padded(frames(3), "left")
    with torch.no_grad():
        assert_close(model(x, mask).logits[1, :29], model(x[1:2, 33:]).logits[0])
    assert not model.can_stream
    with pytest.raises(ValueError, match="full attention has no decode state.*'sliding_attention'"):
        model(frames(1), use_cache=True)


@pytest.mark.parametrize("kind", ["convolution", "sliding"])
def test_a_state_is_copied_pickled_saved_and_selected(kind, tmp_path):
    model, x = tiny(kind), frames()
    with torch.no_grad():
        whole = model(x).logits
    (first, _), cache = stream(model, x[:, :70], 7)
    save_file(cache_to_tensors(cache), tmp_path / "state.safetensors")
    selected = copy.deepcopy(cache)
    selected.batch_select_indices(torch.tensor([1]))
    reordered = copy.deepcopy(cache)
    reordered.reorder_cache(torch.tensor([1, 0]))
    for again in (
        copy.deepcopy(cache),
        pickle.loads(pickle.dumps(cache)),
        cache_from_tensors(load_file(tmp_path / "state.safetensors"), model),
    ):
        assert again.get_seq_length() == 70
        (rest, _), _ = stream(model, x[:, 70:], 7, cache=again)
        assert_close(torch.cat([first, rest]), whole[0])
    assert_close(stream(model, x[1:, 70:], 7, cache=selected)[0][0], whole[1, len(first) :])
    assert_close(stream(model, x[:, 70:].flip(0), 7, cache=reordered)[0][0], whole[1, len(first) :])
    cache.reset()
    assert_close(stream(model, x, 64, cache=cache)[0][0], whole[0])


def test_the_state_does_not_grow():
    for kind in ("decayed", "sliding"):
        model, sizes, cache = tiny(kind), [], None
        for length in (60, 61, 300):
            _, cache = stream(model, frames(1, length), 64, cache=cache)
            sizes.append(sum(tensor.numel() for tensor in cache_tensors(cache)))
        assert len(set(sizes)) == 1


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["decayed", "sliding"])
def test_an_hour_in_pieces_is_the_hour(kind):
    model, x = tiny(kind), frames(1, 360_000)
    (heard,), cache = stream(model, x, 1000)
    with torch.no_grad():
        whole = model(x).logits[0]
    assert_close(heard, whole)
    assert torch.equal(heard.argmax(-1), whole.argmax(-1))
    # The keys and values of a window, and what the other layers sum.
    assert sum(tensor.numel() for tensor in cache_tensors(cache)) < 250


@pytest.mark.parametrize("kind", ["decayed", "sliding"])
def test_silence_and_a_click(kind, tmp_path):
    processor = speech_processor(tmp_path)
    samples = np.zeros(32000, dtype=np.float32)
    samples[16000] = 1.0
    model = tiny(kind, vocab_size=len(processor.tokenizer))
    silence, click = (
        processor(sound, sampling_rate=16000, return_tensors="pt")["input_features"]
        for sound in (samples * 0, samples)
    )
    with torch.no_grad():
        quiet, loud = model(silence).logits[0], model(click).logits[0]
    assert quiet.isfinite().all() and loud.isfinite().all()
    # Frame 98 is the first with the click in it, and frame 96 to 99 make token 24.
    assert torch.equal(quiet[:24], loud[:24]) and not torch.allclose(quiet[24], loud[24])
    assert_close(stream(model, click, 10)[0][0], loud)


def test_caches_that_do_not_fit():
    model, x = tiny(), frames(1, 8)
    empty = DynamicCache()
    with torch.no_grad():
        assert_close(model(x, cache=empty).logits, model(x).logits)
    assert len(empty.layers) == model.config.num_hidden_layers + 1
    language_model = build(SumAggForCausalLM, sumagg_config("pure"))
    heard_text = language_model(torch.tensor([[1, 2, 3]]), use_cache=True).cache
    with pytest.raises(ValueError, match="begins with a RecurrentLayer and not with the layer of a front end"):
        model(x, cache=heard_text)
    with pytest.raises(ValueError, match="`cache` has 3 layers and the model 2"):
        language_model(torch.tensor([[1]]), cache=empty)
    with pytest.raises(ValueError, match="`cache` has 2 layers and the model 1"):
        tiny(num_hidden_layers=1, layer_types=["summation"])(x, cache=empty)
    with pytest.raises(ValueError, match="no going back over audio"):
        empty.layers[0].activate_past_recording()


def test_wrong_inputs_say_what_is_wrong():
    model, x, labels = tiny(), frames(2, 20), torch.tensor([[1, 2], [3, -100]])
    with pytest.raises(ValueError, match=r"\[B, T, F\] with F = 5 .* got \[2, 20, 4\]"):
        model(x[..., :4])
    with pytest.raises(ValueError, match=r"got \[20, 5\]"):
        model(x[0])
    with pytest.raises(TypeError, match="floating dtype, got torch.int16"):
        model((x * 1000).short())
    with pytest.raises(ValueError, match=r"`attention_mask` must have the shape .* \[2, 20\].*got \[2, 19\]"):
        model(x, torch.ones(2, 19))
    for bad in (float("nan"), float("inf")):
        broken = x.clone()
        broken[1, 7, 2] = bad
        cache = DynamicCache(config=model.config)
        with pytest.raises(ValueError, match="`input_features` must be finite"):
            model(broken, cache=cache)
        # What was refused has left nothing in the state.
        assert cache.get_seq_length() == 0
        with torch.no_grad():
            assert_close(model(x, cache=cache).logits, model(x).logits)
    for wrong, message in (
        (labels.float(), "integer dtype"),
        (labels[:1], r"\[B, L\] = \[2, 2\], got \[1, 2\]"),
        (torch.tensor([[61, 2], [3, 3]]), r"in \[0, 61\).*got 61"),
        (torch.tensor([[4, 2], [3, 0]]), "without the blank, 0 .*padded with -100, got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            model(x, labels=wrong)
    with pytest.raises(ValueError, match="`labels` spell the whole audio"):
        model(x, labels=labels, cache=DynamicCache(config=model.config))
    classifier = tiny(model_class=SumAggForAudioClassification)
    for arguments in ({"cache": DynamicCache(config=model.config)}, {"use_cache": True}):
        with pytest.raises(ValueError, match="takes the whole recording"):
            classifier(x, **arguments)


@pytest.mark.parametrize("pooling", ["sum", "mean", "last"])
@pytest.mark.parametrize("is_causal", [True, False])
def test_an_audio_classifier_pools_real_tokens_only(pooling, is_causal):
    model = tiny(model_class=SumAggForAudioClassification, pooling=pooling, is_causal=is_causal, num_labels=3)
    x, mask = padded(frames(3), "left")
    with torch.no_grad():
        logits = model(x, mask).logits
        for row in range(2):
            assert_close(logits[row], model(x[row, mask[row].bool()][None]).logits[0])
        tokens = model.model(x[:1]).last_hidden_state[0]
        # All of the sum's terms, one by one.
        if pooling != "last":
            pooled = sum(model.pooler.proj(token).relu() for token in tokens) / (
                len(tokens) if pooling == "mean" else 1
            )
            assert_close(model.score(pooled), logits[0])
        # Too short for a token.
        assert model(x[:, 10:13].nan_to_num()).logits.isfinite().all()
    assert_close(model(x, mask, labels=torch.tensor([2, 0, 1])).loss, F.cross_entropy(logits, torch.tensor([2, 0, 1])))


def spec_augmented(mask: torch.Tensor | None = None, **changes) -> torch.Tensor:
    """What the front end makes of frames of ones in training."""
    front = tiny("convolution", apply_spec_augment=True, **changes).model.embeddings
    return front._masked(torch.ones(64, 200, 5), mask)


def test_spec_augment_masks_spans_of_real_frames_and_of_bins():
    mask = torch.ones(64, 200, dtype=torch.bool)
    mask[:, :120] = False
    kept = spec_augmented(mask, mask_time_prob=0.2, mask_time_length=8, mask_time_min_masks=0)
    whole = kept[:, 120:, 0]
    assert torch.equal(kept[:, 120:], whole[..., None].expand(-1, -1, 5))
    # The share in expectation, less what overlaps.
    assert 0.1 < 1 - whole.mean().item() <= 0.2
    runs = [len(list(group)) for row in whole.tolist() for value, group in itertools.groupby(row) if not value]
    assert min(runs) >= 8
    kept = spec_augmented(mask_time_prob=0.0, mask_feature_prob=0.4, mask_feature_length=2)
    assert torch.equal(kept, kept[:, :1].expand(-1, 200, -1))
    assert 0.1 < 1 - kept.mean().item() <= 0.4


def test_spec_augment_is_for_training():
    x = frames(2, 60)
    for changes, is_masked in (({}, True), ({"apply_spec_augment": False}, False), ({"mask_time_length": 61}, False)):
        model = tiny("convolution", **changes)
        with torch.no_grad():
            plain = model(x).logits
            assert torch.equal(model(x).logits, plain)
            assert torch.equal(model.train()(x).logits, plain) != is_masked


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_streams_what_it_hears_at_once(dtype):
    model, x = tiny().to(dtype), frames()
    with torch.no_grad():
        exact, whole = tiny()(x).logits, model(x).logits
    assert whole.dtype == dtype
    assert_close(whole.float(), exact, rtol=0.05 if dtype == torch.bfloat16 else 0.01)
    for row, expected in zip(stream(model, x, 7)[0], whole, strict=True):
        assert_close(row.float(), expected.float(), rtol=0.02)


def test_gradients_with_and_without_checkpointing():
    x, mask, labels = frames(2, 40), torch.ones(2, 40).long(), torch.tensor([[5, 6], [7, -100]])
    mask[0, :6] = 0
    gradients = []
    for reentrant in (None, False, True):
        model = tiny("sliding", apply_spec_augment=False).train()
        if reentrant is not None:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model(x, mask, labels=labels).loss.backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, expected in gradients[0].items():
        for other in gradients[1:]:
            torch.testing.assert_close(other[name], expected, rtol=1e-4, atol=1e-6)


def test_trainer_learns_and_evaluates(tmp_path):
    orders = [list(order) for order in itertools.permutations(range(1, 5))]
    rows = [
        {"input_features": F.one_hot(torch.tensor(order), 5).float().repeat_interleave(8, dim=0), "labels": order}
        for order in orders
    ]

    def collate(batch):
        return {name: torch.stack([torch.as_tensor(row[name]) for row in batch]) for name in batch[0]}

    model = SumAggForCTC(speech_config("pure", vocab_size=5, apply_spec_augment=False))
    arguments = TrainingArguments(
        str(tmp_path), max_steps=120, per_device_train_batch_size=24, learning_rate=2e-2, report_to=[], use_cpu=True
    )
    trainer = Trainer(model, arguments, data_collator=collate, train_dataset=rows, eval_dataset=rows)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    predictions = trainer.predict(rows)
    assert predictions.metrics["test_loss"] < 0.1 * before
    # The logits, and neither a cache nor a mask beside them.
    assert predictions.predictions.shape == (24, 8, 5)
    read = [
        [symbol for symbol, _ in itertools.groupby(row.tolist()) if symbol]
        for row in predictions.predictions.argmax(-1)
    ]
    assert sum(text == order for text, order in zip(read, orders, strict=True)) >= 22


def test_the_preset_and_what_a_config_refuses():
    config = AutoConfig.from_pretrained(preset_path("sumagg-speech-small"))
    assert config.inputs_to_logits_ratio == 640 and not hasattr(config, "max_position_embeddings")
    with torch.device("meta"):
        model = AutoModelForCTC.from_config(config)
    d, layers = 192, 6
    front = 12 * 80 * d + d + d * d + d
    # Four maps, the bias of the last, decays of four heads; two maps with biases; two norms.
    block = 4 * d * d + d + 4 * d + 4 + 8 * d * d + 5 * d + 4 * d
    assert model.num_parameters() == front + layers * block + 2 * d + d * 32 + 32
    for values, message in (
        ({"position_embedding_type": "learned"}, "position_embedding_type"),
        ({"subsampling_kernel_size": 3}, "at least `subsampling_factor` = 4.*got 3"),
        ({"subsampling_factor": 0}, "`subsampling_factor` must be at least 1"),
        ({"feature_mean": [0.0] * 5}, "go together and must have `num_mel_bins` = 5"),
        ({"feature_mean": [0.0] * 4, "feature_std": [1.0] * 4}, "`num_mel_bins` = 5 entries"),
        ({"feature_mean": [0.0] * 5, "feature_std": [1.0, 0.0, 1.0, 1.0, 1.0]}, "`feature_std` above 0"),
        ({"pad_token_id": 61}, r"the blank, must be in \[0, 61\), got 61"),
        ({"mask_time_prob": 1.5}, r"`mask_time_prob` must be in \[0, 1\)"),
        ({"mask_feature_length": 6}, r"`mask_feature_length` must be in \[1, 5\]"),
        ({"conv_kernel_size": 3, "is_causal": False}, "is for causal models"),
    ):
        with pytest.raises(Exception, match=message):
            speech_config(**values)


def test_hidden_states_and_output_names():
    model = tiny("sliding", SumAggSpeechModel, attn_implementation="eager")
    outputs = model(frames(1, 20), output_hidden_states=True, output_attentions=True, use_cache=True)
    assert [tuple(h.shape) for h in outputs.hidden_states] == [(1, 5, 16)] * 3
    assert [tuple(a.shape) for a in outputs.attentions] == [(1, 2, 5, 5)]
    assert outputs.cache is outputs.past_key_values and outputs.token_mask.tolist() == [[1] * 5]
    assert torch.equal(model(frames(1, 20), return_dict=False)[0], outputs.last_hidden_state)
