"""The ToST language models: the originals' numbers, and the same logits however a sequence is cut, padded or packed."""

import pytest
import torch
from safetensors.torch import load_file
from testing import assert_close, build
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

from modeling_sumagg import (
    ToSTForCausalLM,
    ToSTTextConfig,
    ToSTTextForSequenceClassification,
    ToSTTextForTokenClassification,
    ToSTTextModel,
)
from modeling_sumagg.configuration import preset_path
from modeling_sumagg.publishing.conversion import convert_original_checkpoint


LAYER_TYPES = {
    "pure": ["token_statistics", "token_statistics"],
    "hybrid": ["token_statistics", "full_attention", "token_statistics"],
    "sliding": ["token_statistics", "sliding_attention"],
}
GOLDEN = "tests/golden/tost_text.safetensors"


def text_config(layers: str = "pure", **kwargs) -> ToSTTextConfig:
    arguments = {
        "vocab_size": 61,
        "hidden_size": 16,
        "num_hidden_layers": len(LAYER_TYPES[layers]),
        "num_attention_heads": 2,
        "intermediate_size": 24,
        "layer_types": LAYER_TYPES[layers],
        "sliding_window": 5,
        "max_position_embeddings": 64,
        "layerscale_value": 1.0,
    }
    return ToSTTextConfig(**{**arguments, **kwargs})


def tokens(*shape: int) -> torch.Tensor:
    return torch.randint(61, shape, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def golden(request) -> tuple[dict[str, torch.Tensor], torch.Tensor, torch.Tensor]:
    tensors = load_file(request.config.rootpath / GOLDEN)
    weights = {name.removeprefix("weights."): t for name, t in tensors.items() if name.startswith("weights.")}
    return weights, tensors["input.input_ids"], tensors["output.logits"]


@pytest.mark.parametrize("container", ["bare", "training", "compiled", "with_head"])
def test_original_checkpoint_converts(golden, tmp_path, container):
    weights, input_ids, logits = golden
    if container == "with_head":
        weights = {**weights, "lm_head.weight": weights["transformer.wte.weight"].clone()}
    prefix = "_orig_mod." if container == "compiled" else ""
    checkpoint = {prefix + name: tensor for name, tensor in weights.items()}
    if container != "bare":
        checkpoint = {
            "model": checkpoint,
            "model_args": {"n_layer": 2},
            "optimizer": {"state": {}},
            "config": {"lr": 1},
        }
    torch.save(checkpoint, tmp_path / "ckpt.pt")

    convert_original_checkpoint("tost_text", tmp_path / "ckpt.pt", tmp_path / "converted")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "converted")
    assert type(model) is ToSTForCausalLM
    assert_close(model(input_ids).logits, logits)


def test_untied_original_keeps_its_output_projection(golden, tmp_path):
    weights, input_ids, logits = golden
    weights = {**weights, "lm_head.weight": 2 * weights["transformer.wte.weight"]}
    torch.save(weights, tmp_path / "ckpt.pt")
    convert_original_checkpoint("tost_text", tmp_path / "ckpt.pt", tmp_path / "converted")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "converted")
    assert not model.config.tie_word_embeddings
    assert_close(model(input_ids).logits, 2 * logits)


def test_conversion_lists_what_does_not_fit(golden, tmp_path):
    weights, _, _ = golden
    weights = {name: t for name, t in weights.items() if name != "transformer.h.1.gamma1"}
    torch.save({**weights, "extra.weight": torch.ones(1)}, tmp_path / "ckpt.pt")
    with pytest.raises(ValueError, match=r"(?s)layers.1.layer_scale1.*extra.weight"):
        convert_original_checkpoint("tost_text", tmp_path / "ckpt.pt", tmp_path / "converted")
    torch.save({"a": torch.ones(1)}, tmp_path / "ckpt.pt")
    with pytest.raises(ValueError, match="not an original tost_text checkpoint"):
        convert_original_checkpoint("tost_text", tmp_path / "ckpt.pt", tmp_path / "converted")


@pytest.mark.parametrize(("name", "published"), [("base", 110), ("medium", 304), ("large", 655)])
def test_presets_have_the_published_sizes(name, published):
    config = AutoConfig.from_pretrained(preset_path(f"tost-{name}"))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    d, layers, positions, heads = (
        config.hidden_size,
        config.num_hidden_layers,
        config.max_position_embeddings,
        config.num_attention_heads,
    )
    # Two d x d maps and the MLP's 8 d^2; two norms and two layer scales; temperature and β.
    layer = 2 * d * d + 8 * d * d + 4 * d + heads + heads * positions
    by_hand = config.vocab_size * d + positions * d + layers * layer + d
    assert model.num_parameters() == by_hand
    # The published counts leave the position table out, as GPT-2 reproductions do.
    assert round((by_hand - positions * d) / 1e6) == published


@pytest.mark.parametrize("layers", LAYER_TYPES)
@pytest.mark.parametrize("positions", ["learned", "sinusoidal", "none"])
def test_chunks_and_single_tokens_equal_one_pass(layers, positions):
    config = text_config(layers, position_embedding_type=positions, use_membership_bias=positions == "learned")
    model = build(ToSTForCausalLM, config)
    input_ids = tokens(2, 40)
    expected = model(input_ids)
    for lengths in ([1] * 40, [3, 1, 1, 17, 1, 9, 8]):
        cache, logits = DynamicCache(config=config), []
        for chunk in input_ids.split(lengths, dim=1):
            logits.append(model(chunk, cache=cache).logits)
        assert_close(torch.cat(logits, dim=1), expected.logits)
        for layer, whole in zip(cache.layers, expected.cache.layers, strict=True):
            for state, final in zip(getattr(layer, "state", ()), getattr(whole, "state", ()), strict=True):
                assert_close(state, final)


@pytest.mark.parametrize("sum_decay", ["none", "learned", "input"])
@torch.no_grad()
def test_token_statistics_are_their_formula(sum_decay):
    config = text_config(sum_decay=sum_decay, use_membership_bias=False, position_embedding_type="none")
    model = build(ToSTTextModel, config).double()
    layer, calls = model.layers[1].attention, []
    layer.register_forward_hook(lambda module, inputs, output: calls.append((inputs[0], *output)))
    model(tokens(2, 12), output_attentions=True)
    ((h, output, memberships),) = calls
    w = layer.w_proj(h).unflatten(2, (2, 8))
    decays = torch.ones(2, 12, 2, dtype=torch.float64)
    if sum_decay != "none":
        logit = layer.decay.logit + (layer.decay.proj(h) if sum_decay == "input" else torch.zeros(2, 12, 2))
        decays = logit.sigmoid()
    squares, weighted, weights, expected = 0, 0, 0, []
    for t in range(12):
        a, w_t = decays[:, t, :, None], w[:, t]
        squares = a * squares + w_t**2
        membership = (layer.temperature * (w_t**2 / squares.clamp(min=1e-12)).sum(-1, keepdim=True)).softmax(1)
        weighted, weights = a * weighted + w_t**2 * membership, a * weights + membership
        expected.append(-w_t * membership / (1 + weighted / (weights + 1e-8)))
        torch.testing.assert_close(memberships[:, :, t].double(), membership[..., 0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(output, layer.o_proj(torch.stack(expected, dim=1).flatten(2)), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("sum_decay", ["none", "input"])
@pytest.mark.parametrize("layers", LAYER_TYPES)
def test_padding_is_transparent(layers, sum_decay):
    model = build(ToSTForCausalLM, text_config(layers, sum_decay=sum_decay, rope_theta=100.0))
    input_ids = tokens(1, 12)
    alone = model(input_ids).logits[0]
    masks = {
        "left": [0] * 8 + [1] * 12,
        "right": [1] * 12 + [0] * 8,
        "middle": [1] * 5 + [0] * 8 + [1] * 7,
    }
    mask = torch.tensor(list(masks.values()))
    padded = torch.full((3, 20), 7)
    for row in range(3):
        padded[row, mask[row].bool()] = input_ids[0]
    cache = DynamicCache(config=model.config)
    whole = model(padded, attention_mask=mask).logits
    first = model(padded[:, :9], attention_mask=mask[:, :9], cache=cache).logits
    second = model(padded[:, 9:], attention_mask=mask, cache=cache).logits
    for row in range(3):
        real = mask[row].bool()
        assert_close(whole[row, real], alone)
        assert_close(torch.cat([first, second], dim=1)[row, real], alone)


@pytest.mark.parametrize("layers", LAYER_TYPES)
def test_packed_documents_do_not_see_each_other(layers):
    model = build(ToSTForCausalLM, text_config(layers))
    documents = [tokens(1, n) for n in (7, 1, 12)]
    packed = torch.cat(documents, dim=1)
    position_ids = torch.cat([torch.arange(d.shape[1]) for d in documents])[None]
    expected = torch.cat([model(d).logits for d in documents], dim=1)
    assert_close(model(packed, position_ids=position_ids).logits, expected)
    cache = DynamicCache(config=model.config)
    parts = [
        model(packed[:, a:b], position_ids=position_ids[:, a:b], cache=cache).logits
        for a, b in ((0, 4), (4, 7), (7, 8), (8, 15), (15, 20))
    ]
    assert_close(torch.cat(parts, dim=1), expected)


@pytest.mark.parametrize("layers", LAYER_TYPES)
def test_gradients_of_packed_and_checkpointed_training(layers):
    model = build(ToSTForCausalLM, text_config(layers)).train()
    documents = [tokens(1, 9), tokens(1, 14)]
    for document in documents:
        model(document, labels=document).loss.mul((document.shape[1] - 1) / 21).backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}

    packed = torch.cat(documents, dim=1)
    position_ids = torch.cat([torch.arange(d.shape[1]) for d in documents])[None]
    labels = packed.masked_fill(position_ids == 0, -100)
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()
        model.zero_grad()
        model(packed, position_ids=position_ids, labels=labels, use_cache=False).loss.backward()
        for name, parameter in model.named_parameters():
            assert_close(parameter.grad, expected[name], rtol=1e-4)


def test_bfloat16_stays_near_float32_over_a_long_sequence():
    config = text_config(position_embedding_type="sinusoidal", use_membership_bias=False)
    model = build(ToSTForCausalLM, config)
    input_ids = tokens(1, 8192)
    with torch.no_grad():
        expected = model(input_ids).logits
        # Two layers, each rounding its activations to 8 bits of mantissa.
        assert_close(model.to(torch.bfloat16)(input_ids).logits, expected, rtol=0.05)


def test_memberships_and_hidden_states_are_returned():
    model = build(ToSTTextModel, text_config("hybrid", attn_implementation="eager"))
    input_ids = tokens(2, 10)
    outputs = model(input_ids, output_attentions=True, output_hidden_states=True)
    first, attention, last = outputs.attentions
    assert first.shape == last.shape == (2, 2, 10)
    assert attention.shape == (2, 2, 10, 10)
    torch.testing.assert_close(first.sum(dim=1), torch.ones(2, 10))
    assert len(outputs.hidden_states) == 4
    cache = DynamicCache(config=model.config)
    model(input_ids[:, :6], cache=cache)
    later = model(input_ids[:, 6:], cache=cache, output_attentions=True).attentions[2]
    assert_close(later, last[:, :, 6:])


def test_classification_heads_take_the_last_real_token():
    config = text_config(num_labels=3)
    model = build(ToSTTextForSequenceClassification, config)
    input_ids = tokens(1, 9)
    padded = torch.cat([input_ids, torch.zeros(1, 4, dtype=torch.long)], dim=1)
    mask = torch.tensor([[1] * 9 + [0] * 4])
    outputs = model(padded, attention_mask=mask, labels=torch.tensor([2]))
    assert_close(outputs.logits, model(input_ids).logits)
    assert_close(outputs.loss, torch.nn.functional.cross_entropy(outputs.logits, torch.tensor([2])))
    with pytest.raises(ValueError, match=r"`labels` must be in \[0, 3\)"):
        model(input_ids, labels=torch.tensor([3]))
    by_token = build(ToSTTextForTokenClassification, config)(input_ids, labels=input_ids % 3)
    assert by_token.logits.shape == (1, 9, 3)
    assert_close(by_token.loss, torch.nn.functional.cross_entropy(by_token.logits[0], input_ids[0] % 3))


@pytest.mark.parametrize("kwargs", [{}, {"position_embedding_type": "sinusoidal"}])
def test_the_context_ends_with_the_learned_positions(kwargs):
    model = build(ToSTForCausalLM, text_config(max_position_embeddings=8, **kwargs))
    with pytest.raises(ValueError, match=r"9 tokens is too long .* for 8 .*truncation=True.*without that limit"):
        model(tokens(1, 9))


def test_the_context_is_unlimited_without_them():
    config = text_config(max_position_embeddings=8, position_embedding_type="sinusoidal", use_membership_bias=False)
    assert build(ToSTForCausalLM, config)(tokens(1, 300)).logits.isfinite().all()


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"layer_types": ["summation", "token_statistics"]}, "`layer_types` may hold"),
        ({"layer_types": ["token_statistics"]}, "`layer_types` must have `num_hidden_layers` = 2 entries"),
        ({"num_attention_heads": 3}, "`num_attention_heads` must divide"),
        ({"hidden_dropout": 1.0}, "`hidden_dropout` must be in"),
        ({"position_embedding_type": "rotary"}, "position_embedding_type"),
    ],
)
def test_config_refuses(kwargs, message):
    with pytest.raises(Exception, match=message):
        text_config(**kwargs)


def test_initial_weights():
    torch.manual_seed(0)
    config = text_config(hidden_size=64, layerscale_value=1e-5, initializer_range=0.02)
    model = ToSTForCausalLM(config)
    layer = model.model.layers[0]
    assert layer.attention.w_proj.weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert layer.attention.o_proj.weight.std().item() == pytest.approx(0.02 / 2, rel=0.1)
    assert layer.mlp.fc2.weight.std().item() == pytest.approx(0.02 / 2, rel=0.1)
    assert (layer.attention.temperature == 1).all() and (layer.attention.membership_bias == 0).all()
    assert (layer.layer_scale1 == 1e-5).all() and (layer.layer_scale2 == 1e-5).all()
    assert model.lm_head.weight is model.model.embed_tokens.weight
