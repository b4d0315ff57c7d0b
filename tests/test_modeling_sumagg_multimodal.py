import numpy as np
import pytest
import torch
from testing import assert_close, build
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.nn import functional as F
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
)

from modeling_sumagg import (
    DataCollatorForMultimodalRegression,
    SumAggForMultimodalRegression,
    SumAggMultimodalConfig,
)
from modeling_sumagg.configuration import preset_path


NAN = float("nan")


def config(**kwargs) -> SumAggMultimodalConfig:
    arguments = {
        "vocab_size": 31,
        "num_numeric_features": 3,
        "image_size": [4, 6],
        "patch_size": 2,
        "num_channels": 2,
        "hidden_size": 8,
        "head_hidden_sizes": [7, 5],
        "max_position_embeddings": 12,
    }
    return SumAggMultimodalConfig(**{**arguments, **kwargs})


def inputs(batch_size: int = 5) -> dict[str, torch.Tensor]:
    """Everything given, but for padding, in float64."""
    mask = torch.ones(batch_size, 9, dtype=torch.long)
    mask[1, 6:] = 0
    mask[2, :3] = 0
    mask[3, 4:6] = 0
    return {
        "input_ids": torch.randint(31, (batch_size, 9)),
        "attention_mask": mask,
        "numeric_features": torch.randn(batch_size, 3, dtype=torch.float64),
        "pixel_values": torch.randn(batch_size, 2, 4, 6, dtype=torch.float64),
    }


def with_gaps(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Row 0 lacks the text, 1 the numbers, 2 the image, 3 everything, 4 one number and one patch of four."""
    batch = {name: tensor.clone() for name, tensor in batch.items()}
    batch["attention_mask"][[0, 3]] = 0
    batch["numeric_features"][[1, 3]] = NAN
    batch["pixel_values"][[2, 3]] = NAN
    batch["numeric_features"][4, 1] = NAN
    batch["pixel_values"][4, 1, 3, 0] = NAN
    return batch


def published(model: SumAggForMultimodalRegression, batch: dict[str, torch.Tensor]) -> np.ndarray:
    """The predictions in NumPy, one row, token, feature and patch at a time."""
    w = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    b = model.config.position_bias
    d = model.config.hidden_size

    def relu(x):
        return np.maximum(x, 0)

    def dense(name, x):
        return relu(w[f"{name}.weight"] @ x + w[f"{name}.bias"])

    predictions = []
    for row in range(len(batch["input_ids"])):
        latent = np.zeros(d)
        ids, mask = batch["input_ids"][row].numpy(), batch["attention_mask"][row].numpy()
        tokens = ids[mask == 1]
        if len(tokens) > 0:
            total = np.zeros(d)
            for position, token in enumerate(tokens):
                modulation = w["text_branch.modulation.position_embeddings.weight"][position] + b
                h = w["embed_tokens.weight"][token] * modulation
                total += relu(w["text_branch.sequence_sum.proj.weight"] @ h)
            latent += dense("text_branch.sequence_sum.dense", total)

        features = batch["numeric_features"][row].numpy()
        if not np.isnan(features).all():
            total = np.zeros(d)
            for f in np.flatnonzero(~np.isnan(features)):
                h = np.array([features[f]])
                for layer in ("feature_dense1", "feature_dense2"):
                    weight, bias = w[f"numeric_branch.{layer}.weight"][f], w[f"numeric_branch.{layer}.bias"][f]
                    h = relu(h @ weight + bias)
                total += h
            latent += dense("numeric_branch.dense2", dense("numeric_branch.dense1", total))

        image = batch["pixel_values"][row].numpy()
        total, given = np.zeros(d), False
        for n in range(6):
            y, x = divmod(n, 3)
            patch = image[:, 2 * y : 2 * y + 2, 2 * x : 2 * x + 2]
            if not np.isnan(patch).any():
                given = True
                embedded = w["image_branch.patch_embeddings.weight"].reshape(d, -1) @ patch.reshape(-1)
                embedded = embedded + w["image_branch.patch_embeddings.bias"]
                h = embedded * (w["image_branch.position_embeddings.weight"][n] + b)
                total += relu(w["image_branch.sequence_sum.proj.weight"] @ h)
        if given:
            latent += dense("image_branch.sequence_sum.dense", total)

        hidden = dense("head.1", dense("head.0", latent))
        predictions.append(w["score.weight"] @ hidden + w["score.bias"])
    return np.stack(predictions)


@pytest.mark.parametrize("gaps", [False, True])
def test_published_formula(gaps):
    model = build(SumAggForMultimodalRegression, config(num_labels=2)).double()
    batch = with_gaps(inputs()) if gaps else inputs()
    assert_close(model(**batch).logits, torch.from_numpy(published(model, batch)), rtol=1e-12)


def test_published_sizes():
    published_config = AutoConfig.from_pretrained(preset_path("sumagg-published-multimodal"), num_numeric_features=4)
    model = AutoModelForSequenceClassification.from_config(published_config)
    d, features = 256, 4
    text = 10000 * d + 512 * d + d * d + (d * d + d)
    numbers = features * (2 * d + d * d + d) + 2 * (d * d + d)
    head = (d * 256 + 256) + (256 * 64 + 64) + (64 + 1)
    assert model.num_parameters() == text + numbers + head
    assert model.dropout.p == 0.2
    assert model.config.problem_type == "regression"


@pytest.mark.parametrize(
    ("row", "given"),
    [
        (0, ["numeric_features", "pixel_values"]),
        (1, ["input_ids", "attention_mask", "pixel_values"]),
        (2, ["input_ids", "attention_mask", "numeric_features"]),
    ],
)
def test_absent_argument_is_absent_row(row, given):
    model = build(SumAggForMultimodalRegression, config()).double()
    batch = with_gaps(inputs())
    alone = model(**{name: batch[name][row : row + 1] for name in given}).logits
    assert_close(model(**batch).logits[row : row + 1], alone, rtol=1e-12)


def test_absent_modality_is_a_model_without_it():
    whole = build(SumAggForMultimodalRegression, config()).double()
    numbers = SumAggForMultimodalRegression(config(vocab_size=None, image_size=None)).double().eval()
    numbers.load_state_dict({name: whole.state_dict()[name] for name in numbers.state_dict()})
    batch = inputs()
    batch["attention_mask"][:] = 0
    batch["pixel_values"][:] = NAN
    expected = numbers(numeric_features=batch["numeric_features"]).logits
    assert_close(whole(**batch).logits, expected, rtol=1e-12)
    assert expected.unique().numel() > 1


def test_texts_without_tokens():
    model = build(SumAggForMultimodalRegression, config())
    features = torch.randn(2, 3)
    nothing = torch.zeros(2, 0, dtype=torch.long)
    expected = model(numeric_features=features).logits
    assert torch.equal(model(input_ids=nothing, attention_mask=nothing, numeric_features=features).logits, expected)
    assert model(input_ids=nothing).logits.shape == (2, 1)


def test_order_of_tokens():
    order = torch.randperm(9)
    ids = torch.randint(31, (2, 9))
    without_positions = build(SumAggForMultimodalRegression, config(position_embedding_type="none")).double()
    assert_close(without_positions(input_ids=ids[:, order]).logits, without_positions(input_ids=ids).logits, 1e-12)
    with_positions = build(SumAggForMultimodalRegression, config()).double()
    assert not torch.allclose(with_positions(input_ids=ids[:, order]).logits, with_positions(input_ids=ids).logits)


def test_inputs_embeds():
    model = build(SumAggForMultimodalRegression, config())
    ids = torch.randint(31, (2, 9))
    embeds = model.get_input_embeddings()(ids)
    assert torch.equal(model(inputs_embeds=embeds).logits, model(input_ids=ids).logits)


def test_gradients_with_gaps():
    model = build(SumAggForMultimodalRegression, config()).double()
    batch = with_gaps(inputs())
    batch["numeric_features"][:, 1] = NAN
    names = ["numeric_features", "pixel_values"]
    for name in names:
        batch[name].requires_grad_()
    model(**batch, labels=torch.randn(5)).loss.backward()
    for name in names:
        assert batch[name].grad.isfinite().all()
        assert (batch[name].grad[batch[name].isnan()] == 0).all()
    for name, parameter in model.named_parameters():
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().sum() > 0, name
    # Feature 1 is given nowhere, the others are.
    assert (model.numeric_branch.feature_dense1.weight.grad[1] == 0).all()
    assert (model.numeric_branch.feature_dense2.bias.grad[1] == 0).all()


def test_gradient_is_the_derivative():
    model = build(SumAggForMultimodalRegression, config()).double()
    batch = with_gaps(inputs())
    features = torch.nan_to_num(batch.pop("numeric_features"), nan=0.5).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: model(**batch, numeric_features=x).logits, features)


def test_standardisation_is_in_the_model():
    statistics = {
        "numeric_mean": [2020.0, -3.0, 1e6],
        "numeric_std": [2.5, 0.1, 3e5],
        "label_mean": [40.0, -1.0],
        "label_std": [12.0, 0.5],
    }
    t = {name: torch.tensor(values, dtype=torch.float64) for name, values in statistics.items()}
    plain = build(SumAggForMultimodalRegression, config(num_labels=2)).double()
    model = build(SumAggForMultimodalRegression, config(num_labels=2, **statistics)).double()
    batch, labels = with_gaps(inputs()), torch.randn(5, 2, dtype=torch.float64) * 10
    expected = plain(**batch).logits.detach() * t["label_std"] + t["label_mean"]
    batch["numeric_features"] = batch["numeric_features"] * t["numeric_std"] + t["numeric_mean"]
    outputs = model(**batch, labels=labels)
    assert_close(outputs.logits, expected, rtol=1e-10)
    assert_close(outputs.loss, ((expected - labels) / t["label_std"]).square().mean(), rtol=1e-10)


def test_bfloat16_keeps_the_units():
    statistics = {"numeric_mean": [2020.0] * 3, "numeric_std": [2.0] * 3, "label_mean": [1e5], "label_std": [1.0]}
    reference = build(SumAggForMultimodalRegression, config(**statistics))
    years = torch.tensor([[2018.0, 2019.0, 2020.0], [2019.0, 2021.0, 2024.0]])
    expected = reference(numeric_features=years).logits - 1e5
    outputs = reference.to(torch.bfloat16)(numeric_features=years, labels=torch.tensor([1e5, 1e5]))
    assert (outputs.logits.dtype, outputs.loss.dtype) == (torch.float64, torch.float32)
    assert_close(outputs.logits - 1e5, expected, rtol=0.05)


@pytest.mark.parametrize(
    ("problem_type", "labels"),
    [
        ("single_label_classification", torch.tensor([0, 2, 1, 1, 0])),
        ("multi_label_classification", torch.rand(5, 3).round()),
        ("regression", torch.randint(9, (5, 3))),
    ],
)
def test_problem_types(problem_type, labels):
    model = build(SumAggForMultimodalRegression, config(num_labels=3, problem_type=problem_type)).double()
    batch = inputs()
    logits = model(**batch).logits
    expected = {
        "single_label_classification": lambda: -logits.log_softmax(-1)[torch.arange(5), labels].mean(),
        "multi_label_classification": lambda: F.binary_cross_entropy(logits.sigmoid(), labels.double()),
        "regression": lambda: (logits - labels).square().mean(),
    }[problem_type]()
    assert_close(model(**batch, labels=labels).loss, expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.tensor([0, 3]), r"`labels` must be in \[0, 3\), or -1 to be ignored, got 3"),
        (torch.tensor([True, False]), "`labels` are indices of 3 classes .*torch.bool"),
    ],
)
def test_classes_that_do_not_exist(labels, message):
    model = SumAggForMultimodalRegression(config(num_labels=3, problem_type="single_label_classification"))
    with pytest.raises(ValueError, match=message):
        model(numeric_features=torch.zeros(2, 3), labels=labels, ignore_index=-1)


def test_ignored_class():
    model = build(SumAggForMultimodalRegression, config(num_labels=3, problem_type="single_label_classification"))
    outputs = model(numeric_features=torch.randn(3, 3), labels=torch.tensor([-1, 2, 0]), ignore_index=-1)
    assert_close(outputs.loss, F.cross_entropy(outputs.logits[1:], torch.tensor([2, 0])))


def test_labels_are_standardised_before_they_are_rounded():
    model = build(SumAggForMultimodalRegression, config(label_mean=[1.7e9], label_std=[3.0]))
    features, labels = torch.randn(2, 3), torch.tensor([1.7e9, 1.7e9 + 6], dtype=torch.float64)
    scores = build(SumAggForMultimodalRegression, config())(numeric_features=features).logits[:, 0]
    loss = model(numeric_features=features, labels=labels).loss
    assert loss.dtype == torch.float32
    assert_close(loss, (scores - torch.tensor([0.0, 2.0])).square().mean())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_seconds_since_1970_stay_apart(dtype):
    """In, out and in the loss, as in a model of float64; float32 tells only every 128th second apart."""
    seconds = 1_700_000_000 + torch.arange(60, dtype=torch.float64)
    statistics = {"numeric_mean": [seconds.mean().item()] * 3, "numeric_std": [17.3] * 3}
    statistics |= {"label_mean": statistics["numeric_mean"][:1], "label_std": [17.3]}
    model = build(SumAggForMultimodalRegression, config(**statistics))
    features = seconds[:, None].expand(-1, 3)
    exact = model.double()(numeric_features=features, labels=seconds)
    assert exact.logits.unique().numel() == 60
    rounded = model.to(dtype)(numeric_features=features, labels=seconds)
    whole = model(numeric_features=features, labels=seconds.long())
    assert rounded.logits.dtype == torch.float64 and torch.equal(whole.loss, rounded.loss)
    # Bits of the weights and of the deviations, not of the seconds.
    precision = {torch.float32: 1e-5, torch.bfloat16: 0.05}[dtype]
    assert (rounded.logits - exact.logits).abs().max() < precision * 17.3 * 3
    assert_close(rounded.loss.double(), exact.loss, rtol=3 * precision)
    if dtype == torch.float32:
        assert rounded.logits.unique().numel() == 60


def test_a_label_that_is_nan_is_refused():
    model = SumAggForMultimodalRegression(config())
    with pytest.raises(ValueError, match="`labels` must be numbers, got NaN: leave out rows without a label"):
        model(numeric_features=torch.zeros(2, 3), labels=torch.tensor([1.0, NAN]))


def test_an_empty_batch():
    model = SumAggForMultimodalRegression(config())
    assert model(**{name: x[:0] for name, x in inputs().items()} | {"numeric_features": None}).logits.shape == (0, 1)


@pytest.mark.parametrize(
    ("argument", "message"),
    [({"classifier_dropout": 2.0}, r"`classifier_dropout` .*got 2.0"), ({"patch_size": 4}, "`patch_size` = 4")],
)
def test_arguments_of_from_pretrained_are_checked(argument, message, tmp_path):
    SumAggForMultimodalRegression(config()).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        SumAggForMultimodalRegression.from_pretrained(tmp_path, **argument)


def test_labels_of_one_output_may_have_a_column():
    model = build(SumAggForMultimodalRegression, config())
    features, labels = torch.randn(4, 3), torch.randint(9, (4,))
    loss = model(numeric_features=features, labels=labels).loss
    assert_close(loss, (model(numeric_features=features).logits[:, 0] - labels).square().mean())
    assert torch.equal(model(numeric_features=features, labels=labels[:, None].double()).loss, loss)


@pytest.mark.parametrize("num_labels", [1, 2, 3])
def test_save_and_load(num_labels, tmp_path):
    statistics = {"numeric_mean": [1.0, 2.0, 3.0], "numeric_std": [1.0, 0.5, 2.0]}
    model = build(SumAggForMultimodalRegression, config(num_labels=num_labels, **statistics))
    model.save_pretrained(tmp_path)
    reloaded, info = AutoModelForSequenceClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert type(reloaded) is SumAggForMultimodalRegression
    assert not any(info.values()), info
    batch = {name: x.float() if x.is_floating_point() else x for name, x in with_gaps(inputs()).items()}
    torch.testing.assert_close(reloaded.eval()(**batch).logits, model(**batch).logits, rtol=1e-5, atol=1e-6)
    assert reloaded(**batch).logits.shape == (5, num_labels)


def test_a_checkpoint_carries_no_language_model(tmp_path):
    config().save_pretrained(tmp_path)
    assert {path.stem.split("_", 2)[2] for path in tmp_path.glob("sumagg_*.py")} == {
        "checks",
        "configuration_fields",
        "configuration_sumagg_multimodal",
        "modeling_sumagg_multimodal",
        "positions",
        "position_modulation",
        "registration",
    }


def test_initial_scale():
    """Standardised numbers and short texts reach the latent neither vanishing nor exploding, whatever the width."""
    for hidden_size in (32, 512):
        model = SumAggForMultimodalRegression(
            config(hidden_size=hidden_size, image_size=None, num_numeric_features=8, head_hidden_sizes=[256, 64])
        ).eval()
        latents = []
        model.head[0].register_forward_pre_hook(lambda module, args, latents=latents: latents.append(args[0]))
        model(numeric_features=torch.randn(64, 8))
        model(input_ids=torch.randint(31, (64, 12)))
        for latent in latents:
            assert 0.02 < latent.square().mean().sqrt() < 5


def test_compiled():
    model = build(SumAggForMultimodalRegression, config()).double()
    batch = with_gaps(inputs())
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert_close(compiled(**batch).logits, model(**batch).logits, rtol=1e-10)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({}, "No modality is given"),
        ({"attention_mask": torch.ones(2, 4)}, "No modality is given"),
        ({"numeric_features": torch.zeros(2, 4)}, r"F = 3 .*got \[2, 4\]"),
        ({"numeric_features": torch.zeros(3)}, r"\[B, F\].*got \[3\]"),
        ({"numeric_features": torch.tensor([[1.0, float("inf"), 2.0]])}, "infinity"),
        ({"pixel_values": torch.zeros(2, 2, 6, 4)}, r"\[B, 2, 4, 6\], got \[2, 2, 6, 4\]"),
        ({"input_ids": torch.tensor([[31]])}, r"`input_ids` must be in \[0, 31\)"),
        ({"input_ids": torch.zeros(1, 13, dtype=torch.long)}, r"too long .* for 12 "),
        ({"input_ids": torch.zeros(1, 3, dtype=torch.long), "inputs_embeds": torch.zeros(1, 3, 8)}, "not both"),
        ({"input_ids": torch.zeros(1, 3, dtype=torch.long), "attention_mask": torch.ones(1, 4)}, "attention_mask"),
        ({"numeric_features": torch.zeros(2, 3), "labels": torch.zeros(3)}, r"`labels` must have the shape \[B\]"),
        ({"numeric_features": torch.zeros(2, 3), "labels": torch.zeros(2, 2)}, r"\[B, num_labels\] = \[2, 1\]"),
        ({"input_ids": torch.zeros(3, dtype=torch.long)}, r"`input_ids` must have the shape \[B, T\]"),
        (
            {"input_ids": torch.zeros(2, 3, dtype=torch.long), "numeric_features": torch.zeros(1, 3)},
            "`numeric_features` has 1 rows and `input_ids` 2",
        ),
    ],
)
def test_bad_input(kwargs, message):
    with pytest.raises(ValueError, match=message):
        SumAggForMultimodalRegression(config())(**kwargs)


def test_integer_numbers():
    with pytest.raises(TypeError, match="torch.int64"):
        SumAggForMultimodalRegression(config())(numeric_features=torch.zeros(2, 3, dtype=torch.long))


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"input_ids": torch.zeros(1, 3, dtype=torch.long)}, "`input_ids` is given.*`config.vocab_size`=None"),
        ({"pixel_values": torch.zeros(1, 3, 8, 8)}, "`pixel_values` is given.*`config.image_size`=None"),
    ],
)
def test_modality_that_the_model_lacks(kwargs, message):
    model = SumAggForMultimodalRegression(config(vocab_size=None, image_size=None))
    with pytest.raises(ValueError, match=message):
        model(**kwargs)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"vocab_size": None, "num_numeric_features": 0, "image_size": None}, "no modality"),
        ({"image_size": 5}, "`image_size` must be a multiple of `patch_size` = 2"),
        ({"hidden_size": 0}, "`hidden_size` must be at least 1, got 0"),
        ({"head_hidden_sizes": [4, 0]}, r"`head_hidden_sizes\[1\]` must be at least 1"),
        ({"classifier_dropout": 1.0}, r"\[0, 1\), got 1.0"),
        ({"numeric_mean": [0.0] * 3}, "go together"),
        ({"numeric_mean": [0.0] * 2, "numeric_std": [1.0] * 2}, "`num_numeric_features` = 3 entries"),
        ({"numeric_mean": [0.0] * 3, "numeric_std": [1.0, 0.0, 1.0]}, "above 0"),
        ({"numeric_mean": [0.0, NAN, 0.0], "numeric_std": [1.0] * 3}, "finite"),
        ({"position_bias": float("inf")}, "`position_bias` must be finite, got inf"),
        ({"initializer_range": float("inf")}, "`initializer_range` must be finite, got inf"),
        ({"initializer_range": -1.0}, "`initializer_range` must be finite and at least 0, got -1.0"),
        (
            {"label_mean": [0.0] * 2, "label_std": [1.0] * 2, "num_labels": 2}
            | {"problem_type": "single_label_classification"},
            "problem_type='regression'",
        ),
    ],
)
def test_bad_config(kwargs, message):
    with pytest.raises(Exception, match=message):
        config(**kwargs)


def word_tokenizer() -> PreTrainedTokenizerFast:
    words = ["[PAD]", "small", "large", "old", "new", "house"]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="[PAD]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]")


def test_collator():
    image = np.random.default_rng(0).normal(size=(2, 4, 6))
    rows = [
        {"input_ids": [1, 5], "numeric_features": [1.0, None, 3.0], "pixel_values": None, "label": 1.5},
        {"input_ids": None, "numeric_features": None, "pixel_values": image, "label": 2.0},
        {"input_ids": torch.tensor([2, 3, 5]), "attention_mask": torch.tensor([1, 0, 1]), "label": 3.0},
    ]
    collate = DataCollatorForMultimodalRegression(word_tokenizer())
    batch = collate(rows)
    assert batch["input_ids"].tolist() == [[1, 5, 0], [0, 0, 0], [2, 3, 5]]
    assert batch["attention_mask"].tolist() == [[1, 1, 0], [0, 0, 0], [1, 0, 1]]
    assert batch["numeric_features"].nan_to_num(nan=-9).tolist() == [[1, -9, 3], [-9] * 3, [-9] * 3]
    assert batch["pixel_values"].isnan().all(dim=(1, 2, 3)).tolist() == [True, False, True]
    assert torch.equal(batch["pixel_values"][1], torch.tensor(image, dtype=torch.float32))
    assert batch["pixel_values"].dtype == torch.float32
    assert batch["labels"].tolist() == [1.5, 2.0, 3.0]

    model = build(SumAggForMultimodalRegression, config())
    alone = torch.cat([model(**collate([row])).logits for row in rows])
    assert_close(model(**batch).logits, alone)


def test_collator_keeps_the_digits_of_numbers_and_labels():
    rows = [{"numeric_features": [1_700_000_001.0, 0.1], "label": 3}, {"numeric_features": [1.0, None], "label": 2.7}]
    batch = DataCollatorForMultimodalRegression()(rows)
    assert batch["numeric_features"].nan_to_num(-9).tolist() == [[1_700_000_001.0, 0.1], [1.0, -9.0]]
    assert batch["labels"].tolist() == [3.0, 2.7]
    rounded = DataCollatorForMultimodalRegression(dtype=torch.float32)(rows)
    assert rounded["numeric_features"].dtype == rounded["labels"].dtype == torch.float32
    assert rounded["labels"].tolist() == np.float32([3.0, 2.7]).tolist()


@pytest.mark.parametrize(
    ("labels", "dtype"),
    [([3, 2**40], torch.int64), ([[0, 1], [1, 1]], torch.int64), ([[0.5, 1], [1, 1]], torch.float64)]
    + [([np.int32(3), torch.tensor(4)], torch.int64), ([True, False], torch.int64)],
)
def test_collator_stacks_labels_of_every_type(labels, dtype):
    for name in ("label", "labels"):
        batch = DataCollatorForMultimodalRegression()([{"numeric_features": [1.0], name: label} for label in labels])
        assert torch.equal(batch["labels"], torch.tensor(np.array(labels).tolist(), dtype=dtype))
        assert batch["labels"].dtype == dtype


@pytest.mark.parametrize("first", [{}, {"label": None}, {"labels": None}])
def test_a_row_without_a_label_takes_no_other_label_away(first):
    batch = DataCollatorForMultimodalRegression()([{**first, "input_ids": None}, {"label": 2.7}])
    assert batch["labels"].isnan().tolist() == [True, False] and batch["labels"][1] == 2.7


def test_collator_leaves_out_what_no_row_has():
    collate = DataCollatorForMultimodalRegression()
    assert set(collate([{"numeric_features": [1.0], "input_ids": None}])) == {"numeric_features"}
    texts = DataCollatorForMultimodalRegression(word_tokenizer(), pad_to_multiple_of=8)
    assert texts([{"input_ids": [1], "numeric_features": None}])["input_ids"].shape == (1, 8)
    assert DataCollatorForMultimodalRegression(word_tokenizer())([{"input_ids": []}] * 2)["input_ids"].shape == (2, 0)


def test_collator_errors():
    with pytest.raises(ValueError, match="give the collator the `tokenizer`"):
        DataCollatorForMultimodalRegression()([{"input_ids": [1]}])
    with pytest.raises(ValueError, match=r"`numeric_features` must have the same shape in every row.*\(1,\), \(2,\)"):
        DataCollatorForMultimodalRegression()([{"numeric_features": [1.0]}, {"numeric_features": [1.0, 2.0]}])


def training_rows() -> list[dict]:
    """A label that needs both the text and the numbers; some rows lack one of them."""
    generator = np.random.default_rng(0)
    rows = []
    for index in range(64):
        ids = generator.integers(1, 6, size=generator.integers(1, 6)).tolist()
        number = float(generator.normal())
        rows.append(
            {
                "input_ids": ids if index % 8 else None,
                "numeric_features": [number, None, 2.0] if index % 8 != 1 else None,
                "labels": (ids.count(2) if index % 8 else 0) + (number if index % 8 != 1 else 0),
            }
        )
    return rows


def train(tmp_path, model: SumAggForMultimodalRegression, **arguments):
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(tmp_path),
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
            use_cpu=True,
            lr_scheduler_type="constant",
            max_grad_norm=0,
            **arguments,
        ),
        train_dataset=training_rows(),
        data_collator=DataCollatorForMultimodalRegression(word_tokenizer()),
    )
    return trainer.train()


def test_trainer_learns_both_modalities(tmp_path):
    model = SumAggForMultimodalRegression(config(hidden_size=32, head_hidden_sizes=[32, 16], classifier_dropout=0.0))
    train(tmp_path, model, max_steps=120, learning_rate=5e-3, per_device_train_batch_size=32)
    batch = DataCollatorForMultimodalRegression(word_tokenizer())(training_rows())
    variance = batch["labels"].var(correction=0)
    with torch.no_grad():
        assert model.eval()(**batch).loss < 0.1 * variance
        assert model(**{**batch, "input_ids": None}).loss > 0.3 * variance
        assert model(**{**batch, "numeric_features": None}).loss > 0.3 * variance


def test_gradient_accumulation_is_a_larger_batch(tmp_path):
    weights = []
    for batch_size, accumulation in ((16, 1), (4, 4)):
        model = build(SumAggForMultimodalRegression, config(classifier_dropout=0.0))
        train(
            tmp_path,
            model,
            max_steps=2,
            learning_rate=1e-2,
            optim="sgd",
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=accumulation,
        )
        weights.append(torch.cat([parameter.detach().flatten() for parameter in model.parameters()]))
    start = torch.cat([p.flatten() for p in build(SumAggForMultimodalRegression, config()).parameters()])
    assert_close(weights[1] - start, weights[0] - start, rtol=1e-4)
