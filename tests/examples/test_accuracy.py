"""The measurement of the papers' other claims: its data, its rivals of equal size, its runs, and its report."""

import random
import sys
from pathlib import Path

import numpy as np
import pytest
import torch


EXAMPLES = Path(__file__).parents[2] / "examples" / "benchmarks"


@pytest.fixture
def accuracy(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import accuracy

    return accuracy


@pytest.fixture
def tiny(accuracy, monkeypatch):
    """Texts of two classes, told apart by one word; half of a number is in the text and half is given."""

    def load(arguments):
        draw = random.Random(0)
        texts, labels, numbers = {}, {}, {}
        for name, count in zip(accuracy.SPLITS, (240, 40, 40), strict=True):
            labels[name] = [draw.randrange(2) for _ in range(count)]
            texts[name] = [" ".join(draw.choices("abcde", k=9) + [("no", "yes")[label]]) for label in labels[name]]
            numbers[name] = [[draw.random(), draw.random(), draw.random()] for _ in range(count)]
        splits, vocab_size = accuracy.tokenized(texts, vocab_size=300)
        for name in accuracy.SPLITS:
            splits[name]["labels"] = torch.tensor(labels[name])
            if accuracy.TASKS[arguments.task].metric == "r2":
                splits[name]["numeric_features"] = torch.tensor(numbers[name])
                given = splits[name]["numeric_features"][:, 0]
                splits[name]["labels"] = splits[name]["labels"] + 2 * given
        return splits, {"vocab_size": vocab_size, "num_labels": 2 if arguments.task != "functions" else 1}

    for task in ("packages", "functions"):
        monkeypatch.setattr(accuracy.TASKS[task], "load", load)


@pytest.fixture
def run_main(accuracy, tmp_path, monkeypatch, capsys):
    def main(*arguments: str):
        output = tmp_path / "accuracy.jsonl"
        with monkeypatch.context() as patch:
            patch.setattr(sys, "argv", ["accuracy.py", "--output", str(output), *arguments])
            accuracy.main()
        return accuracy.read_lines(output), capsys.readouterr().out

    return main


def test_classifiers_learn_and_runs_are_not_made_again(accuracy, tiny, run_main, monkeypatch):
    arguments = ["--task", "packages", "--epochs", "10", "--learning_rates", "1e-5", "1e-2", "--seeds", "0", "1"]
    lines, printed = run_main(*arguments)
    by_model = {name: [line for line in lines if line["model"] == name] for name in ("sum", "attention", "bag")}
    for runs in by_model.values():
        assert [(line["seed"], line["learning_rate"]) for line in runs] == [(0, 1e-5), (0, 1e-2), (1, 1e-2)]
        assert runs[-1]["test"] > 0.9 and runs[0]["loss"] == -runs[0]["validation"]
    assert [line["test"] for line in lines if line["model"] == "tf-idf"] == [1.0]
    assert 0.3 < next(line["test"] for line in lines if line["model"] == "majority") < 0.7
    assert "`packages`: 240 train, 40 validation, 40 test; 10 epochs" in printed
    assert "| the mean of the embeddings | " in printed and "| 0.01 | 2 | " in printed
    assert "| TF-IDF, logistic regression | – | – | – | 1.000 |" in printed

    monkeypatch.setattr(accuracy, "run", None)
    assert run_main(*arguments)[0] == lines


@pytest.mark.slow
def test_a_regression_needs_both_parts(accuracy, tiny, run_main):
    lines, printed = run_main(
        "--task", "functions", "--epochs", "40", "--learning_rates", "5e-3", "--seeds", "0", "--batch_size", "16"
    )
    reached = {line["model"]: line["test"] for line in lines}
    # A quarter and a third of the variances, by hand.
    assert min(reached["shared-sum"], reached["concatenation"]) > 0.9
    assert 0.2 < reached["text-alone"] < 0.6 and 0.3 < reached["ridge"] < 0.75
    assert "| model | parameters | rate | seeds | test R² | s to train |" in printed


def test_rivals_are_equal_and_their_inputs_are_what_they_say(accuracy):
    sizes = {"num_labels": 62}
    parameters = [accuracy.TASKS["glyphs"].models[name][1](sizes, {}).num_parameters() for name in ("tost", "vit")]
    assert abs(parameters[1] / parameters[0] - 1) < 0.02
    bag = accuracy.bag_classifier({"vocab_size": 20, "num_labels": 3}, {}).eval()
    ids, labels = torch.tensor([[3, 4, 9]]), torch.tensor([1])
    logits = bag(ids, torch.tensor([[1, 1, 0]]), labels)["logits"]
    torch.testing.assert_close(logits, bag(ids[:, [1, 0]], torch.ones(1, 2), labels)["logits"])


def test_glyphs_are_tested_on_fonts_that_were_not_trained_on(accuracy, monkeypatch):
    used = []
    truetype = accuracy.ImageFont.truetype
    monkeypatch.setattr(accuracy, "CHARACTERS", "Ag7")
    monkeypatch.setattr(accuracy.ImageFont, "truetype", lambda path, size: used.append(path) or truetype(path, size))
    splits, sizes = accuracy.glyphs(None)
    assert sizes == {"num_labels": 3}
    train, validation, test = set(used[:300]), set(used[300:330]), set(used[330:])
    assert len(train) >= 12 and len(validation) == 3 and len(test) == 4
    assert not (train & validation or train & test or validation & test)
    pixels = splits["test"]["pixel_values"]
    assert pixels.shape == (60, 3, 32, 32) and pixels.min() == -1 and pixels.max() == 1
    assert np.bincount(splits["train"]["labels"]).tolist() == [100] * 3


@pytest.mark.slow
def test_functions_are_not_told_how_long_they_go_on(accuracy):
    splits, _ = accuracy.functions(None)
    assert sum(len(split["labels"]) for split in splits.values()) > 9000
    assert max(text.count("\n") for text in splits["train"]["texts"]) == 4
    # Of the same file in one split.
    firsts = {name: set(split["texts"]) for name, split in splits.items()}
    assert len(firsts["train"] & firsts["test"]) < 0.1 * len(firsts["test"])


def test_what_is_typed_wrong_is_named(run_main):
    for arguments, message in (
        (["--task", "digits", "--models", "sum"], r"digits has no models \['sum'\]. Choose of \['tost', 'vit'\]"),
        (["--epochs", "0"], "must be at least 1"),
        (["--report"], "There are no runs in"),
    ):
        with pytest.raises(SystemExit, match=message):
            run_main(*arguments)
