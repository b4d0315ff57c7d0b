"""The parts of the data: held-out rows, short runs and streams."""

import json
from collections import Counter

import pytest

from modeling_sumagg.training.scripts import DataArguments, LabelledDataArguments, encode_labels, load_splits


TEXT_AND_LABEL = {"text": "text", "label": "label"}


@pytest.fixture
def csv_of(tmp_path):
    """`csv_of({"x": 90, "y": 10})` writes a file with so many rows of each class, sorted by class."""

    def write(counts: dict[str, int]) -> str:
        rows = [f"{label} {number},{label}" for label, count in counts.items() for number in range(count)]
        (tmp_path / "a.csv").write_text("\n".join(["text,label", *rows]))
        return str(tmp_path / "a.csv")

    return write


@pytest.mark.parametrize(
    ("counts", "share", "held_out"),
    [
        ({"x": 90, "y": 10}, 0.1, {"x": 9, "y": 1}),
        ({"x": 50, "y": 30, "z": 20}, 0.25, {"x": 13, "y": 7, "z": 5}),
        # A class of one row stays in the training data.
        ({"x": 19, "y": 1}, 0.1, {"x": 2}),
        ({"x": 3, "y": 3}, 0.1, {"x": 1}),
    ],
)
def test_each_class_has_its_share_of_the_held_out_rows(csv_of, counts, share, held_out):
    arguments = LabelledDataArguments(train_file=csv_of(counts), held_out_share=share)
    splits = load_splits(arguments, None, TEXT_AND_LABEL, seed=0)
    assert Counter(splits["validation"]["label"]) == held_out
    assert Counter(splits["train"]["label"]) == Counter(counts) - Counter(held_out)
    assert not {*splits["train"]["text"]} & {*splits["validation"]["text"]}
    again = load_splits(arguments, None, TEXT_AND_LABEL, seed=0)
    other = load_splits(arguments, None, TEXT_AND_LABEL, seed=1)
    assert again["validation"]["text"][:] == splits["validation"]["text"][:]
    assert sum(counts.values()) < 10 or other["validation"]["text"][:] != splits["validation"]["text"][:]
    assert splits["train"].info.description == "a.csv"
    assert splits["validation"].info.description == f"{share} of the rows of a.csv, drawn at random in each class"


def test_classes_of_one_row_cannot_be_held_out(csv_of):
    with pytest.raises(ValueError, match="a.csv has 3 rows in 3 classes: too few to hold some out"):
        load_splits(LabelledDataArguments(train_file=csv_of(dict.fromkeys("xyz", 1))), None, TEXT_AND_LABEL, seed=0)


def test_a_short_run_has_few_rows_of_all_classes(csv_of):
    file = csv_of({"x": 50, "y": 50})
    arguments = LabelledDataArguments(
        train_file=file, validation_file=file, test_file=file, max_train_samples=20, max_eval_samples=10
    )
    splits = load_splits(arguments, None, TEXT_AND_LABEL, seed=0)
    assert splits.num_rows == {"train": 20, "validation": 10, "test": 10}
    assert {*splits["train"]["label"]} == {"x", "y"} and len({*splits["train"]["text"]}) == 20


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"held_out_share": 0.0}, "--held_out_share must be between 0 and 1, got 0.0"),
        ({"held_out_share": 1.0}, "--held_out_share must be between 0 and 1, got 1.0"),
        ({"max_train_samples": 0}, "--max_train_samples must be at least 1, got 0"),
        ({"max_eval_samples": -1}, "--max_eval_samples must be at least 1, got -1"),
    ],
)
def test_shares_and_numbers_of_rows_are_checked(arguments, message):
    with pytest.raises(ValueError, match=message):
        DataArguments(**arguments)


@pytest.fixture
def stream(tmp_path):
    """`stream(rows, **options)` streams a file with so many rows, the third of which has an empty text."""

    def load(rows: int, held_out_rows: int = 100, **options):
        texts = ["" if row == 2 else f"row {row}" for row in range(rows)]
        (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
        arguments = DataArguments(train_file=str(tmp_path / "a.jsonl"), **options)
        splits = load_splits(arguments, None, {"text": "text"}, seed=0, streaming=True, held_out_rows=held_out_rows)
        return {name: [row["text"] for row in split] for name, split in splits.items()}

    return load


def test_the_first_rows_of_a_stream_are_held_out(stream):
    parts = stream(10, held_out_rows=3)
    assert parts == {"train": [f"row {row}" for row in range(3, 10)], "validation": ["row 0", "row 1", ""]}
    assert stream(10, held_out_rows=3, drop_incomplete_rows=True)["validation"] == ["row 0", "row 1", "row 3"]
    short = stream(10, held_out_rows=3, max_train_samples=2, max_eval_samples=1)
    assert short == {"train": ["row 3", "row 4"], "validation": ["row 0"]}


@pytest.mark.parametrize("rows", [1, 60, 100])
def test_a_stream_that_is_held_out_as_a_whole_is_refused(stream, rows):
    with pytest.raises(
        ValueError, match="--held_out_rows 100 of a.jsonl leave no row to hold out or none to train on"
    ):
        stream(rows)


def test_a_stream_names_the_line_that_it_cannot_read(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n\n{"text": ["b"]}\n')
    path = str(tmp_path / "a.jsonl")
    splits = load_splits(
        DataArguments(train_file=path, validation_file=path), None, {"text": "text"}, seed=0, streaming=True
    )
    with pytest.raises(ValueError, match=r"a\.jsonl, line 3: 'text' must be text"):
        list(splits["train"])
    with pytest.raises(ValueError, match="has no column 'body'"):
        load_splits(
            DataArguments(train_file=path, validation_file=path), None, {"text": "body"}, seed=0, streaming=True
        )


def test_numbers_are_classes_in_the_order_of_their_values_and_codes_in_that_of_text(csv_of):
    for labels, names in (
        (["10", "2", "-1", "0.5"], ["-1", "0.5", "2", "10"]),
        (["10", "02", "1", "01"], ["01", "02", "1", "10"]),
        (["10", "2", "none"], ["10", "2", "none"]),
    ):
        file = csv_of(dict.fromkeys(labels, 2))
        splits = load_splits(LabelledDataArguments(train_file=file, held_out_share=0.25), None, TEXT_AND_LABEL, seed=0)
        encoded, found = encode_labels(splits)
        assert found == names
        for split in encoded.values():
            assert [names[label] for label in split["labels"]] == [text.split()[0] for text in split["text"]]
