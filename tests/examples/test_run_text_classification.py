import csv
import re

import pytest
import torch
from running import assert_card_is_true, config_overrides, metrics
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer, pipeline

from modeling_sumagg.models.families import FAMILIES


@pytest.mark.parametrize("family", ["sumagg", pytest.param("tost_text", marks=pytest.mark.slow), "gpt2"])
def test_a_csv_with_text_and_label(run_script, csv_folder, csv_files, short_run, family):
    run = run_script(
        "run_text_classification.py", *short_run, *csv_files, *config_overrides(family), "--max_length", 64
    )
    model = AutoModelForSequenceClassification.from_pretrained(run.folder)
    tokenizer = AutoTokenizer.from_pretrained(run.folder)
    assert model.config.id2label == {0: "cat", 1: "dog"}
    assert model.config.label2id == {"cat": 0, "dog": 1}
    with (csv_folder / "validation.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert "" in [row["text"] for row in rows]
    right = 0
    for row in rows:
        *ids, end = tokenizer(row["text"])["input_ids"]
        assert end == tokenizer.eos_token_id
        ids = [*ids[:63], end]
        with torch.no_grad():
            predicted = model(torch.tensor([ids])).logits[0].argmax().item()
        right += model.config.id2label[predicted] == row["label"]
    assert metrics(run.folder)["eval_accuracy"] == pytest.approx(right / len(rows))
    majority = max(sum(row["label"] == label for row in rows) for label in ("cat", "dog")) / len(rows)
    assert f"{majority:.2%}  most frequent class" in run.printed
    assert "TF-IDF and logistic regression" in run.printed
    assert (run.folder / "README.md").exists() == (family in FAMILIES)


def test_the_model_of_the_defaults_has_no_limit_of_length(run_script, csv_files, short_run):
    run = run_script("run_text_classification.py", *short_run, *csv_files)
    tokenizer = AutoTokenizer.from_pretrained(run.folder)
    assert tokenizer.padding_side == "left" and tokenizer.model_max_length > 10**9
    # Longer than anything that it was trained on, and than the default of `max_position_embeddings`.
    classifier = pipeline("text-classification", model=str(run.folder), truncation=True)
    document = "meow purr claw " * 2000
    assert len(tokenizer(document)["input_ids"]) > 4000
    # An empty text ends too, and so has a token.
    for answer in (*classifier([document, ""], batch_size=2), *classifier(["", ""], batch_size=2)):
        assert answer["label"] in ("cat", "dog") and 0.5 <= answer["score"] <= 1


def test_numbers_as_labels_other_column_names_and_a_test_file(run_script, tmp_path, short_run):
    for name in ("train", "test"):
        lines = [f"{'good' if row % 3 else 'bad'} thing number {row},{[10, 2, 2][row % 3]}" for row in range(30)]
        (tmp_path / f"{name}.csv").write_text("\n".join(["review,stars", *lines]))
    run = run_script(
        "run_text_classification.py", *short_run, *config_overrides("sumagg"), "--train_file", "train.csv",
        "--test_file", "test.csv", "--text_column_name", "review", "--label_column_name", "stars",
    )  # fmt: skip
    assert {"eval_accuracy", "test_accuracy"} <= set(metrics(run.folder))
    assert re.search(r"Accuracy +validation +test\n +[\d.]+% +[\d.]+%  this model", run.printed)
    card = assert_card_is_true(
        run.folder,
        run.printed,
        {"accuracy": metrics(run.folder)["test_accuracy"]},
        ["most frequent class", "TF-IDF and logistic regression"],
        data="train.csv, 27 examples",
        max_length=1024,
    )
    assert (card.measured_on, card.num_examples) == ("test.csv", 30)
    assert AutoModelForSequenceClassification.from_pretrained(run.folder).config.id2label == {0: "2", 1: "10"}


def test_a_causal_checkpoint_is_the_start_of_a_classifier(language_model, run_script, csv_files, short_run):
    base = language_model("sumagg", "flattened").folder
    # Without a learning rate only the weights that the checkpoint has are known.
    folder = run_script(
        "run_text_classification.py", *short_run, *csv_files, "--model_name_or_path", base, "--learning_rate", 0
    ).folder
    before, after = load_file(base / "model.safetensors"), load_file(folder / "model.safetensors")
    shared = {name for name in before if name.startswith("model.")}
    assert len(shared) > 20
    for name in shared:
        torch.testing.assert_close(after[name], before[name], rtol=0, atol=0)
    tokenizer, ending = (AutoTokenizer.from_pretrained(place) for place in (base, folder))
    assert ending("cat")["input_ids"] == [*tokenizer("cat")["input_ids"], tokenizer.eos_token_id]
    assert ending.get_vocab() == tokenizer.get_vocab()


@pytest.mark.parametrize("family", [pytest.param("sumagg", marks=pytest.mark.slow), "tost_text"])
def test_a_language_model_is_adapted(language_model, run_script, csv_files, short_run, family):
    base = language_model(family, {"sumagg": "flattened", "tost_text": "padded"}[family]).folder
    run = run_script(
        "run_text_classification.py", *short_run, *csv_files, "--model_name_or_path", base, "--max_length", 64,
        "--lora_rank", 4, "--learning_rate", 1e-2, "--gradient_checkpointing", True, "--bf16", True, "--use_cpu", True,
    )  # fmt: skip
    targets = {*FAMILIES[family].lora_target_modules, "embed_tokens"}
    adapters = load_file(run.folder / "adapter_model.safetensors")
    adapted = {name.split(".lora_")[0].rpartition(".")[2] for name in adapters if ".lora_" in name}
    assert adapted <= targets and "embed_tokens" in adapted
    assert "before training" in run.printed
    model = AutoModelForSequenceClassification.from_pretrained(run.folder / "merged")
    assert model.config.id2label == {0: "cat", 1: "dog"}


@pytest.mark.parametrize(
    ("header", "rows", "message"),
    [
        ("title,label", ["a,b", "c,d"], r"no column 'text'. Its columns are \['title', 'label'\]"),
        ("text,class", ["a,b", "c,d"], r"no column 'label'. Its columns are \['text', 'class'\].*_column_name"),
        ("text,label", ["a,b", "c,", "d,b"], r"a\.csv, line 3: 'label' is empty\. Fill it, or"),
        ("text,label", ["a,b", "c,b", "d,b"], r"at least two classes, the data has \['b'\]"),
    ],
)
def test_a_csv_that_cannot_be_learned_is_refused(error_of, tmp_path, header, rows, message):
    for name in ("a.csv", "b.csv"):
        (tmp_path / name).write_text("\n".join([header, *rows]))
    error = error_of("run_text_classification.py", "--train_file", "a.csv", "--validation_file", "b.csv")
    assert re.search(message, error)


@pytest.mark.full_training
def test_the_defaults_beat_the_baselines(run_script):
    run = run_script("run_text_classification.py", "--disable_tqdm", True)
    assert metrics(run.folder)["test_accuracy"] > 0.75
    assert "is no better than" not in run.printed
