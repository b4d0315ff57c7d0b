"""Cards: their code runs, their facts are escaped, and numbers of every kind are numbers."""

import ast
import re

import numpy as np
import pytest
import torch
from checkpoints import save_with_outputs
from huggingface_hub import ModelCard
from PIL import Image
from testing import build, multimodal_config, speech_config, sumagg_config, tost_config, tost_text_config
from transformers import AutoImageProcessor

from modeling_sumagg import (
    SumAggForAudioClassification,
    SumAggForCausalLM,
    SumAggForCTC,
    SumAggForMaskedLM,
    SumAggForMultimodalRegression,
    SumAggForSequenceClassification,
    SumAggForTokenClassification,
    SumAggModel,
    ToSTForCausalLM,
    ToSTForImageClassification,
    ToSTModel,
)
from modeling_sumagg.publishing.cards import printable
from modeling_sumagg.publishing.hub import check_card, create_model_card


SPECIAL = {"pad_token_id": 0, "eos_token_id": 1}
NUMBERS = {"numeric_mean": [1.5, -2.0, 1.7e9, 0.0], "numeric_std": [1.0] * 4, "label_mean": [4.0], "label_std": [2.0]}
FACTS = {
    "dataset_name": "words",
    "metrics": {"perplexity": 2.0},
    "baselines": {"frequencies": {"perplexity": 3.0}},
}


def card_of(**facts) -> ModelCard:
    return create_model_card(build(SumAggForCausalLM, sumagg_config("pure")), model_id="me/x", **FACTS | facts)


def code_of(card: ModelCard) -> str:
    (code,) = re.findall(r"^```python\n(.*?)^```$", card.text, re.DOTALL | re.MULTILINE)
    return code


def table_of(card: ModelCard, section: str) -> list[list[str]]:
    """The cells of a section's table, without its head of dashes."""
    text = card.text.partition(f"## {section}\n")[2].partition("\n## ")[0]
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert all(line.count("|") == rows[0].count("|") for line in rows)
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in rows if not re.fullmatch("[|:-]+", line)]


@pytest.mark.parametrize(
    ("model_class", "config"),
    [
        (SumAggForCausalLM, sumagg_config("hybrid", **SPECIAL)),
        (ToSTForCausalLM, tost_text_config("hybrid", **SPECIAL)),
        (SumAggForMaskedLM, sumagg_config("pure", is_causal=False, conv_kernel_size=None, **SPECIAL)),
        (SumAggForSequenceClassification, sumagg_config("pure", num_labels=3, **SPECIAL)),
        (SumAggForTokenClassification, sumagg_config("pure", num_labels=3, **SPECIAL)),
        (SumAggModel, sumagg_config("pure", **SPECIAL)),
        (SumAggForMultimodalRegression, multimodal_config(**NUMBERS)),
        (ToSTForImageClassification, tost_config()),
        (ToSTModel, tost_config()),
        (SumAggForCTC, speech_config()),
        (SumAggForAudioClassification, speech_config(num_labels=3)),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else "",
)
def test_the_code_in_a_card_runs(model_class, config, tmp_path, monkeypatch, capsys):
    if "Image" in model_class.__name__ or model_class is ToSTModel:
        if hasattr(AutoImageProcessor, "_backends"):  # A dummy of transformers, which names what is missing.
            pytest.skip("this version of transformers has `AutoImageProcessor` only where torchvision is installed")
    monkeypatch.chdir(tmp_path)
    model = build(model_class, config)
    save_with_outputs(model, tmp_path / "model")
    Image.new("RGB", (30, 20), (200, 10, 10)).save("photo.jpg")
    features = ["rooms", "\n# area", "built in", "'x'"] if model_class is SumAggForMultimodalRegression else None
    card = create_model_card(model, model_id="model", **FACTS, prompt="w1 w2", numeric_features=features)
    code = code_of(card).replace('    revision="<commit hash>",\n', "").replace(', revision="<commit hash>"', "")
    assert "<commit hash>" not in code and "trust_remote_code=True" in code
    capsys.readouterr()
    scope = {"samples": np.random.default_rng(0).normal(size=16000).astype("float32")}
    exec(code, scope)
    printed = capsys.readouterr().out.strip()
    with torch.no_grad():
        outputs = scope["model"](**scope["inputs"])
    if model_class is SumAggForMultimodalRegression:
        assert ast.literal_eval(printed) == pytest.approx(outputs.logits[0].tolist())
        assert scope["inputs"]["numeric_features"].tolist() == [NUMBERS["numeric_mean"]]
        assert "# In this order: rooms, # area, built in, 'x'." in code
    elif model_class in (SumAggForCausalLM, ToSTForCausalLM):
        assert f"{printed} ".startswith("w1 w2 ")
    elif model_class in (SumAggForSequenceClassification, ToSTForImageClassification, SumAggForAudioClassification):
        assert printed == model.config.id2label[outputs.logits.argmax().item()]
    elif model_class is SumAggForTokenClassification:
        expected = [model.config.id2label[label] for label in outputs.logits[0].argmax(-1).tolist()]
        assert ast.literal_eval(printed) == expected
    elif model_class in (SumAggModel, ToSTModel):
        assert printed == f"torch.Size({list(outputs[0].shape)})"


NASTY = {
    "a cell": "a|b.csv",
    "a row": "a |\n| parameters | 175,000,000,000",
    "a heading": "a\n## Results\n\n| fake | 1 |",
    "HTML": "<img src=x onerror=alert(1)>",
    "a link": "[x](javascript:alert(1))",
    "a fence": "```\n~~~\n",
    "a template": "{{ 7 * 7 }}{% raw %}",
    "YAML": "x\nlicense: other\n---\n",
    "an escape": "\x1b[2Ja\u202etxt.exe\0",
    "half a character": "a\udcff",
}


@pytest.mark.parametrize("text", NASTY.values(), ids=NASTY)
def test_names_stay_in_their_places(text, tmp_path):
    facts = {
        "dataset_name": text,
        "evaluated_on": text,
        "baselines": {text: {"perplexity": 3.0}},
        "hyperparameters": {text: text},
        "units": {"perplexity": text},
        "hardware": text,
        "base_model": text.replace("\0", ""),
    }
    card, plain = card_of(**facts), card_of(base_model="b", hyperparameters={"a": 1})
    card.save(tmp_path / "README.md")
    assert check_card(tmp_path / "README.md")
    data = ModelCard.load(tmp_path / "README.md").data
    assert (data.license, data.eval_results[0].dataset_name) == ("apache-2.0", text)
    # The same headings, rows and blocks of code as in a card of plain names.
    for structure in (r"^#+ .*", r"^\|", r"^(?:```|~~~)"):
        found = [re.findall(structure, each.text, re.MULTILINE) for each in (card, plain)]
        assert found[0] == found[1]
    table = dict(table_of(card, "Training")[1:])
    assert table["data"] == table["hardware"] == table[table["data"]]
    assert [row[0] for row in table_of(card, "Results")][1:] == ["**this model**", table["data"]]
    outside = re.sub(r"```.*?```|`[^`\n]*`", "", card.text, flags=re.DOTALL)
    assert not re.search(r"<(?!commit)|\]\(|49", outside) and card.text.replace("\n", "").isprintable()


@pytest.mark.parametrize(
    "text", ['x", revision=__import__("os").system("id"))#', "a\\", "a\nb", '"' * 3, *NASTY.values()]
)
def test_names_in_the_code_of_a_card_are_texts(text):
    card = create_model_card(build(SumAggForCausalLM, sumagg_config("pure")), model_id=text, **FACTS, prompt=text)
    strings = [node.value for node in ast.walk(ast.parse(code_of(card))) if isinstance(node, ast.Constant)]
    assert strings.count(text) == 3


@pytest.mark.parametrize("sample", ["x\n~~~\n\n# Injected\n~~~", "~~~~", "```\n## a", "plain\n\n    text"])
def test_a_sample_stays_in_its_block(sample):
    text = card_of(sample=sample).text.partition("## Sample\n\n~~~text\n")[2]
    block = re.split(r"^ {0,3}~~~+\s*$", text, maxsplit=1, flags=re.MULTILINE)[0]
    assert [line.strip() for line in block.splitlines()] == [line.strip() for line in sample.splitlines()]


@pytest.mark.parametrize(
    "number",
    [0.123456789, np.float32(0.123456789), np.float64(0.123456789), torch.tensor([0.123456789]), 7, np.int64(7)],
)
def test_numbers_of_every_kind_are_metrics_with_six_digits(number, tmp_path):
    card = card_of(metrics={"perplexity": number}, baselines={"b": {"perplexity": number}})
    card.save(tmp_path / "README.md")
    value = ModelCard.load(tmp_path / "README.md").data.eval_results[0].metric_value
    assert value == (7 if float(number) == 7 else 0.123457)
    cell = "7" if float(number) == 7 else "0.1235"
    assert table_of(card, "Results")[1:] == [["**this model**", cell], ["b", cell]]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), None, "x", torch.zeros(2), np.zeros(2)])
def test_what_is_no_finite_number_is_no_metric(value):
    for facts in ({"metrics": {"perplexity": value}}, {"baselines": {"b": {"perplexity": value}}}):
        with pytest.raises(ValueError, match="A metric must be a finite number, got .* for 'perplexity'"):
            card_of(**facts)


def test_the_facts_of_a_run_are_in_its_card(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    card = card_of(
        dataset_name="a.csv, 54 examples",
        evaluated_on="b.csv",
        num_examples=1234,
        steps=77,
        hyperparameters={"seed": 3, "rate": 1e-3},
        metrics={"perplexity": 12345.678},
        base_model="me/base",
    )
    assert card.data.eval_results[0].dataset_name == "b.csv"
    assert (card.data.base_model, card.data.base_model_relation) == ("me/base", "finetune")
    assert "Measured on b.csv (1,234 examples)." in card.text
    assert table_of(card, "Results")[1] == ["**this model**", "12,346"]
    training = table_of(card, "Training")[1:]
    assert training[:5] == [
        ["data", "a.csv, 54 examples"], ["started from", "`me/base`"], ["optimizer steps", "77"], ["seed", "3"], ["rate", "0.001"],
    ]  # fmt: skip
    less = card_of()
    assert (
        less.data.base_model is None
        and not {"optimizer steps", "started from"} & dict(table_of(less, "Training")[1:]).keys()
    )
    # A folder of this machine is named without the folders above it.
    (tmp_path / "runs" / "clm").mkdir(parents=True)
    local = card_of(base_model=str(tmp_path / "runs" / "clm"))
    assert local.data.base_model == "clm" and str(tmp_path) not in str(local)


@pytest.mark.parametrize("layers", ["pure", "hybrid", "sliding"])
def test_every_paragraph_of_a_card_is_one_line(layers):
    text = create_model_card(build(SumAggForCausalLM, sumagg_config(layers)), model_id="x", **FACTS).text
    prose = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    lines = [line for line in prose.splitlines() if line and line[0] not in "|#-"]
    assert all(re.search(r"[.:]$", line) and line[0].isupper() for line in lines), lines
    counts = {
        "pure": "2 of the type `summation`.",
        "hybrid": "2 of the type `summation`, 1 of the type `full_attention`.",
    }
    assert counts.get(layers, "1 of the type `summation`, 1 of the type `sliding_attention`.") in text
    assert ("bytes a token for the keys and values of full attention" in text) == (layers == "hybrid")


def test_printable_escapes_what_a_terminal_obeys():
    assert printable("a\x1b[2J\n b\u202e\udcff é") == r"a\x1b[2J b\u202e\udcff é"
