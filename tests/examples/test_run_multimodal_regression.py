import ast
import csv
import inspect
import json
import math
import random
import re
import sysconfig
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from running import assert_card_is_true, metrics
from safetensors.torch import load_file
from sklearn.linear_model import Ridge
from sklearn.metrics import r2_score
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from modeling_sumagg import DataCollatorForMultimodalRegression, embedded_data


TINY = json.dumps(
    {"hidden_size": 32, "max_position_embeddings": 16, "head_hidden_sizes": [32, 16], "classifier_dropout": 0.0}
)


@pytest.fixture
def houses(tmp_path) -> list[str]:
    """A price that needs the text and the numbers; some rooms and some texts are missing, and one column is constant."""
    draw = random.Random(0)
    for split, rows in (("train", 300), ("validation", 60)):
        with (tmp_path / f"{split}.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["description", "rooms", "year", "country", "price"])
            for row in range(rows):
                words = draw.choices(["villa", "ruin", "flat", "attic", "garden"], k=draw.randint(1, 6))
                rooms, year = draw.randint(1, 9), draw.randint(1900, 2020)
                words = [] if row % 20 == 0 else words
                price = 1000 * (50 * (words.count("villa") - words.count("ruin")) + 30 * rooms + (year - 1960))
                writer.writerow([" ".join(words), "" if row % 15 == 7 else rooms, year, 1, price])
    return [
        "--train_file", str(tmp_path / "train.csv"), "--validation_file", str(tmp_path / "validation.csv"),
        "--text_column_name", "description", "--label_column_name", "price",
        "--numeric_column_names", "rooms", "year", "country",
    ]  # fmt: skip


def test_a_csv_in_its_own_units(run_script, houses, tmp_path):
    folder, printed = run_script(
        "run_multimodal_regression.py", *houses, "--config_overrides", TINY, "--vocab_size", 300, "--max_steps", 150,
        "--learning_rate", 5e-3, "--disable_tqdm", True, "--eval_strategy", "steps", "--eval_steps", 75,
    )  # fmt: skip
    with (tmp_path / "validation.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    prices = np.array([float(row["price"]) for row in rows])

    # The checkpoint alone, on the raw rows.
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    columns = ["rooms", "year", "country"]
    batch = DataCollatorForMultimodalRegression(tokenizer)(
        [
            {
                "input_ids": tokenizer(row["description"])["input_ids"] if row["description"] else None,
                "numeric_features": [float(row[name]) if row[name] else None for name in columns],
            }
            for row in rows
        ]
    )
    with torch.no_grad():
        predictions = model(**batch).logits[:, 0].numpy()
    results = metrics(folder)
    assert results["eval_r2"] == pytest.approx(r2_score(prices, predictions), abs=1e-4)
    assert results["eval_rmse"] == pytest.approx(np.sqrt(np.mean((prices - predictions) ** 2)), rel=1e-3)
    # The numbers alone cannot know the words.
    with (tmp_path / "train.csv").open(newline="") as file:
        training_rows = list(csv.DictReader(file))

    def numbers(rows: list[dict]) -> np.ndarray:
        values = np.array([[float(row[name] or "nan") for name in columns] for row in rows])
        return np.nan_to_num(values, nan=np.nanmean([float(row["rooms"] or "nan") for row in training_rows]))

    ridge = Ridge().fit(numbers(training_rows), [float(row["price"]) for row in training_rows])
    ridge_r2 = ridge.score(numbers(rows), prices)
    assert results["eval_r2"] > ridge_r2 + 0.05
    line = next(line for line in printed.splitlines() if line.endswith("ridge on the numbers"))
    assert float(line.split()[0]) == pytest.approx(ridge_r2, abs=0.01)
    assert "is no better than: ridge" not in printed

    for name in ("training.png", "predictions.png"):
        assert np.asarray(Image.open(folder / name).convert("L")).std() > 5
    measured = {name: results[f"eval_{name}"] for name in ("r2", "rmse")}
    baselines = ["attention and concatenation", "ridge on the numbers"]
    card = assert_card_is_true(folder, printed, measured, baselines, data="train.csv, 300 examples")
    assert (card.measured_on, card.num_examples) == ("validation.csv", 60)
    assert "# In this order: rooms, year, country." in card.text and "rmse (price)" in card.text


def test_a_worse_model_is_said_to_be_worse_and_is_adapted_to_other_columns(run_script, houses, tmp_path):
    """The branch of the numbers is a new one; the text's is adapted, and nothing else of it moves."""
    base = run_script(
        "run_multimodal_regression.py", *houses, "--config_overrides", TINY, "--vocab_size", 300, "--max_steps", 1,
        "--learning_rate", 0, "--disable_tqdm", True, "--eval_strategy", "no", output_dir="base",
    )  # fmt: skip
    assert re.search("The model is no better than: .*ridge on the numbers", base.printed)
    run = run_script(
        "run_multimodal_regression.py", *houses[:-1], "--model_name_or_path", base.folder, "--lora_rank", 4,
        "--max_steps", 40, "--learning_rate", 1e-2, "--disable_tqdm", True, "--eval_strategy", "no",
    )  # fmt: skip
    assert "  before training\n" in run.printed
    assert metrics(run.folder)["eval_r2"] > metrics(base.folder)["eval_r2"] + 0.1
    before, after = (load_file(folder / "model.safetensors") for folder in (base.folder, run.folder / "merged"))
    assert before["numeric_branch.feature_dense1.weight"].shape[0] == 3
    assert after["numeric_branch.feature_dense1.weight"].shape[0] == 2
    changed = {
        name
        for name in before
        if before[name].shape == after[name].shape and not torch.equal(before[name], after[name])
    }
    assert {name for name in changed if not name.startswith("numeric_branch")} == {
        "text_branch.sequence_sum.proj.weight", "text_branch.sequence_sum.dense.weight", "score.weight", "score.bias",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--numeric_column_names", "rooms"], r"no column 'rooms'. Its columns are \['text', 'size', 'label'\]"),
        ([], "--numeric_column_names"),
        (["--numeric_column_names", "size"], r"a\.csv, line 3: 'label' is empty"),
    ],
)
def test_bad_data_is_refused(error_of, tmp_path, arguments, message):
    (tmp_path / "a.csv").write_text("text,size,label\na,1,2\nb,2,\nc,3,4\n")
    files = ["--train_file", "a.csv", "--validation_file", "a.csv"]
    assert re.search(message, error_of("run_multimodal_regression.py", *files, *arguments))


@pytest.fixture(scope="module")
def every_row() -> dict[str, tuple[str, dict]]:
    """The split and the row of every function in some of the packages, by its text."""
    packages = ("asyncio", "email", "json", "logging", "random.py", "textwrap.py")
    root = Path(sysconfig.get_path("stdlib"))
    every_file = embedded_data.standard_library_files()
    files = [path for path in every_file if path.relative_to(root).parts[0] in packages]
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(embedded_data, "standard_library_files", lambda: files)
        splits = embedded_data.standard_library_functions()
    return {row["text"]: (split, row) for split, rows in splits.items() for row in rows}


@pytest.mark.parametrize("function", [textwrap.dedent, textwrap.fill, random.Random.choices, json.dumps])
def test_facts_of_a_function(every_row, function):
    _, row = every_row[f"{function.__name__}\n{inspect.getdoc(function)}"]
    parameters = inspect.signature(function).parameters.values()
    kinds = [parameter.kind for parameter in parameters]
    assert row["positional_parameters"] == kinds.count(inspect.Parameter.POSITIONAL_OR_KEYWORD)
    assert row["keyword_only_parameters"] == kinds.count(inspect.Parameter.KEYWORD_ONLY)
    assert row["variadic_parameters"] == kinds.count(inspect.Parameter.VAR_KEYWORD)
    assert row["defaults"] == sum(parameter.default is not parameter.empty for parameter in parameters)
    assert row["is_method"] == ("." in function.__qualname__)
    assert row["annotations"] == row["decorators"] == 0
    source = inspect.getsource(function).rstrip().splitlines()
    assert row["label"] == pytest.approx(math.log(len(source) - len(function.__doc__.splitlines())))


def test_a_package_is_in_one_split(every_row):
    import asyncio
    import email.message
    import email.utils
    import logging.config
    import logging.handlers

    for members in (
        [asyncio.Queue.put, asyncio.Task.cancel, asyncio.run],
        [email.message.Message.get_payload, email.utils.parsedate_to_datetime, email.utils.formatdate],
        [logging.Logger.setLevel, logging.handlers.RotatingFileHandler.doRollover, logging.config.fileConfig],
    ):
        splits = {every_row[f"{member.__name__}\n{inspect.getdoc(member)}"][0] for member in members if member.__doc__}
        assert len(splits) == 1


@pytest.mark.slow
def test_embedded_data_by_default(run_script):
    folder, printed = run_script("run_multimodal_regression.py", "--max_steps", 4, "--disable_tqdm", True)
    rows = ast.literal_eval(re.search(r"\{'train'.*?\}", printed).group())
    assert sum(rows.values()) > 3000
    for split in ("validation", "test"):
        assert 0.05 < rows[split] / sum(rows.values()) < 0.3
    assert "test_r2" in metrics(folder)
    assert AutoModelForSequenceClassification.from_pretrained(folder).config.num_numeric_features == 7
