import csv
import json

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer


def rows_of(path: str) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("family", ["sumagg", "tost_text"])
def test_a_csv_with_text_and_label(run_script, csv_files, short_run, config_overrides, family, capsys):
    folder = run_script(
        "run_text_classification.py", *short_run, *csv_files, *config_overrides(family), "--max_length", 64
    )
    reported = json.loads((folder / "eval_results.json").read_text())["eval_accuracy"]
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert model.config.id2label == {0: "cat", 1: "dog"}
    assert model.config.label2id == {"cat": 0, "dog": 1}
    rows = rows_of(csv_files[3])
    assert "" in [row["text"] for row in rows]
    right = 0
    for row in rows:
        ids = tokenizer(row["text"])["input_ids"][:63] + [tokenizer.eos_token_id]
        with torch.no_grad():
            predicted = model(torch.tensor([ids])).logits[0].argmax().item()
        right += model.config.id2label[predicted] == row["label"]
    assert reported == pytest.approx(right / len(rows))
    majority = max(sum(row["label"] == label for row in rows) for label in ("cat", "dog")) / len(rows)
    printed = capsys.readouterr().out
    assert f"{majority:.2%}  most frequent class" in printed
    assert "TF-IDF and logistic regression" in printed
    assert "name: Accuracy" in (folder / "README.md").read_text() or "accuracy" in (folder / "README.md").read_text()


def test_numbers_as_labels_other_column_names_and_a_test_file(run_script, tmp_path, short_run, config_overrides):
    for name in ("train", "test"):
        lines = [f"{'good' if row % 3 else 'bad'} thing number {row},{[10, 2, 2][row % 3]}" for row in range(30)]
        (tmp_path / f"{name}.csv").write_text("\n".join(["review,stars", *lines]))
    folder = run_script(
        "run_text_classification.py", *short_run, *config_overrides("sumagg"), "--train_file", "train.csv",
        "--test_file", "test.csv", "--text_column_name", "review", "--label_column_name", "stars",
    )  # fmt: skip
    results = json.loads((folder / "all_results.json").read_text())
    assert {"eval_accuracy", "test_accuracy"} <= set(results)
    assert AutoModelForSequenceClassification.from_pretrained(folder).config.id2label == {0: "2", 1: "10"}


def test_a_causal_checkpoint_is_the_start_of_a_classifier(run_script, csv_files, short_run, config_overrides):
    base = run_script(
        "run_clm.py", *short_run, *csv_files, *config_overrides("sumagg"), "--block_size", 16, output_dir="base"
    )
    # Without a learning rate only the weights that the checkpoint has are known.
    folder = run_script(
        "run_text_classification.py", *short_run, *csv_files, "--model_name_or_path", base, "--learning_rate", 0
    )
    from safetensors.torch import load_file

    before, after = load_file(base / "model.safetensors"), load_file(folder / "model.safetensors")
    shared = {name for name in before if name.startswith("model.")}
    assert len(shared) > 20
    for name in shared:
        torch.testing.assert_close(after[name], before[name], rtol=0, atol=0)
    assert (folder / "tokenizer.json").read_text() == (base / "tokenizer.json").read_text()


@pytest.mark.parametrize(
    ("header", "rows", "message"),
    [
        ("title,label", ["a,b", "c,d"], r"no column 'text'. Its columns are \['title', 'label'\]"),
        ("text,class", ["a,b", "c,d"], r"no column 'label'. Its columns are \['text', 'class'\].*--label_column_name"),
        ("text,label", ["a,b", "c,", "d,b"], "Row 1 of the train split has no label"),
        ("text,label", ["a,b", "c,b", "d,b"], r"at least two classes, the data has \['b'\]"),
    ],
)
def test_a_csv_that_cannot_be_learned_is_refused(run_script, tmp_path, header, rows, message):
    for name in ("a.csv", "b.csv"):
        (tmp_path / name).write_text("\n".join([header, *rows]))
    with pytest.raises(ValueError, match=message):
        run_script("run_text_classification.py", "--train_file", "a.csv", "--validation_file", "b.csv")
