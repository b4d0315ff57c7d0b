"""Data files as people have them, read by every script: as they are, or refused with file, line and remedy."""

import json
import os
import re
import runpy
import shutil
import struct
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import ClassLabel, Dataset, Features, Value
from PIL import Image, ImageOps

from modeling_sumagg.training import scripts


EXAMPLES = Path(__file__).parents[2] / "examples"
NAN = float("nan")
# The script of each task, its own options, and its columns.
TASKS = {
    "documents": ("run_clm.py", [], ["text"]),
    "classes": ("run_text_classification.py", [], ["text", "label"]),
    "numbers": ("run_multimodal_regression.py", ["--numeric_column_names", "size"], ["text", "size", "label"]),
    "images": ("run_image_classification.py", [], ["image", "label"]),
}


class Loaded(Exception):
    """The splits of a script, which ends with it before it makes a model of them."""


@pytest.fixture
def load(tmp_path, monkeypatch, capsys) -> Callable[..., tuple[list[tuple], str]]:
    """Run a script up to its data: the rows to train on, or the message of the error; and what was printed."""
    original = scripts.load_splits

    def stop(*args, **kwargs):
        raise Loaded(original(*args, **kwargs))

    def run(task: str, file: str, *arguments: object) -> tuple[Any, str]:
        name, own, columns = TASKS[task]
        shutil.copy(EXAMPLES / name, tmp_path)
        command = [name, "--train_file", file, "--output_dir", "out", *own, *map(str, arguments)]
        if "--validation_file" not in command and "--held_out_share" not in command:
            command += ["--validation_file", file]
        monkeypatch.setattr(sys, "argv", command)
        monkeypatch.setattr(scripts, "load_splits", stop)
        with pytest.raises((Loaded, SystemExit)) as ending:
            runpy.run_path(name, run_name="__main__")
        printed = capsys.readouterr().out
        if ending.type is SystemExit:
            message = str(ending.value.code)
            assert message.startswith("error: ") and message.isprintable(), message
            return message, printed
        splits = ending.value.args[0]
        rows = {split: list(zip(*(data[name] for name in columns), strict=True)) for split, data in splits.items()}
        return (rows["train"] if "--held_out_share" not in command else rows), printed

    monkeypatch.chdir(tmp_path)
    return run


class File(NamedTuple):
    """
    A file and its outcome for some tasks: rows, or the error as a regular expression.
    """

    name: str
    content: bytes | str | Callable[[Path], None]
    outcomes: dict[str, Any]


def parquet(rows: dict[str, list], features: Features | None = None) -> Callable[[Path], None]:
    return lambda path: Dataset.from_dict(rows, features=features).to_parquet(path)


def raw_parquet(rows: dict[str, list]) -> Callable[[Path], None]:
    return lambda path: pq.write_table(pa.table(rows), path)


def text_and_label(rows: list[tuple[str, str]]) -> dict[str, Any]:
    return {"documents": [row[:1] for row in rows], "classes": rows}


CLASSES = Features({"text": Value("string"), "label": ClassLabel(names=["z", "y"])})
FILES = [
    # csv: text as it stands there.
    File("plain.csv", "text,label\na,x\nb,y\n", text_and_label([("a", "x"), ("b", "y")])),
    File("no_last_line_end.csv", "text,label\na,x\nb,y", text_and_label([("a", "x"), ("b", "y")])),
    File("carriage_returns.csv", "text,label\r\na,x\r\nb,y\r\n", text_and_label([("a", "x"), ("b", "y")])),
    File("byte_order_mark.csv", "\ufefftext,label\na,x\nb,y\n", text_and_label([("a", "x"), ("b", "y")])),
    File("UPPER.CSV", "text,label\na,x\nb,y\n", text_and_label([("a", "x"), ("b", "y")])),
    File("name[1] {a,b} *?.csv", "text,label\na,x\nb,y\n", text_and_label([("a", "x"), ("b", "y")])),
    File("url::of%20b#c.csv", "text,label\na,x\nb,y\n", text_and_label([("a", "x"), ("b", "y")])),
    File(
        "quotes.csv",
        'text,label\n"a, ""b""\nc",x\n\n"",y\n\'d\',x\n',
        text_and_label([('a, "b"\nc', "x"), ("", "y"), ("'d'", "x")]),
    ),
    File(
        "codes.csv",
        "text,label\n007,01\n1.10,1\n1e5,10\nNA,null\nTrue,NaN\n",
        text_and_label([("007", "01"), ("1.10", "1"), ("1e5", "10"), ("NA", "null"), ("True", "NaN")]),
    ),
    File("spaces.csv", "text,label\n a , x\nb,x \n", text_and_label([(" a ", "x"), ("b", "x")])),
    File(
        "alphabets.csv",
        "text,label\nनमस्ते,हाँ\nสวัสดี,ใช่\nİstanbul,e\u0301\n👩‍👩‍👧,نعم\n",
        text_and_label([("नमस्ते", "हाँ"), ("สวัสดี", "ใช่"), ("İstanbul", "e\u0301"), ("👩‍👩‍👧", "نعم")]),
    ),
    File("long.csv", f"text,label\n{'a ' * 100_000},x\nb,y\n", text_and_label([("a " * 100_000, "x"), ("b", "y")])),
    File("blank.csv", "text,label\n \nb,y\n", {"classes": r"blank\.csv, line 2: 1 cells, where line 1 names 2 columns"}),
    # csv: refused, with the line as an editor counts it.
    File(
        "no_label.csv",
        'text,label\n"two\nlines",x\n\nb,\nc,y\nd, \n',
        {
            "documents": [("two\nlines",), ("b",), ("c",), ("d",)],
            "classes": r"no_label\.csv, line 5: 'label' is empty, the first of 2 such rows\. .*--drop_incomplete_rows",
        },
    ),
    File("too_many.csv", 'text,label\n"a\nb",x\na, b,x\n', {"classes": r"too_many\.csv, line 4: 3 cells, .*in quotes"}),
    File("open_quote.csv", 'text,label\na,x\n"b,y\nc,x\n', {"classes": r"open_quote\.csv, line 3: unexpected end"}),
    File("quote_inside.csv", 'text,label\na,x\n"b" c,y\n', {"classes": r"quote_inside\.csv, line 3: .*in quotes as a"}),
    File("latin.csv", "text,label\na,x\ncafé,y\n".encode("latin-1"), {"classes": r"latin\.csv, line 3: .*as UTF-8"}),
    File("wide.csv", "text,label\na,x\n".encode("utf-16"), {"classes": r"wide\.csv, line 1: .*Save the file as UTF-8"}),
    File("semicolons.csv", "text;label\na;x\n", {"classes": "no column 'text'.*separated by ';': save it with commas"}),
    File("tabs.csv", "text\tlabel\na\tx\n", {"documents": r"separated by '\\t': save it with commas"}),
    File("other.csv", "body,class\na,x\n", {"classes": r"columns are \['body', 'class'\]: choose .*_column_name"}),
    File("twice.csv", "text,label,text\na,x,b\n", {"classes": r"twice\.csv, line 1: two columns are named 'text'"}),
    File("header.csv", "text,label\n", {"classes": r"header\.csv has no rows"}),
    File("empty.csv", "", {"documents": r"empty\.csv has no rows", "numbers": r"empty\.csv has no rows"}),
    File("notes.md", "text", {"documents": r"ends with one of \['\.csv', .*got 'notes\.md'"}),
    # Numbers.
    File(
        "numbers.csv",
        "text,size,label\na, 5 ,1.5\n,,-2\nc,1e3,1700000001\n",
        {"numbers": [("a", 5.0, 1.5), ("", NAN, -2.0), ("c", 1000.0, 1700000001.0)]},
    ),
    File("no_target.csv", "text,size,label\na,1,2\nb,2,\n", {"numbers": r"no_target\.csv, line 3: 'label' is empty"}),
    File("thousands.csv", 'text,size,label\na,1,2\nb,"1,234",3\n', {"numbers": r"line 3: 'size' must be a finite .*'1,234'"}),
    File("infinite.csv", "text,size,label\na,inf,2\n", {"numbers": r"infinite\.csv, line 2: 'size' must be a finite number"}),
    File("not_known.csv", "text,size,label\na,1,N/A\n", {"numbers": r"line 2: 'label' must be a finite .*'N/A'.*empty cell"}),
    File("large.jsonl", f'{{"text": "a", "size": 1{"0" * 400}, "label": 1}}', {"numbers": "line 1: 'size' must be a finite"}),
    # JSON: an object a line, or an array.
    File(
        "mixed.jsonl",
        '{"text": "a", "label": 1}\n\n{"text": "b", "label": "1"}\n{"text": "c", "label": 1.0, "size": [2]}\n',
        text_and_label([("a", "1"), ("b", "1"), ("c", "1")]),
    ),
    File("first_lacks.jsonl", '{"text": "a"}\n{"text": "b", "label": "x"}\n', {
        "documents": [("a",), ("b",)], "classes": r"first_lacks\.jsonl, line 1: 'label' is empty",
    }),
    File("nan.jsonl", '{"text": "a", "label": 0}\n{"text": "b", "label": NaN}\n', {"classes": "line 2: 'label' is empty"}),
    File("array.json", '[{"text": "a",\n "label": true},\n {"text": "b", "label": null}]', {
        "documents": [("a",), ("b",)], "classes": r"array\.json, entry 2: 'label' is empty",
    }),
    File("broken.jsonl", '{"text": "a"}\n{"text": "b"\n', {"documents": r"broken\.jsonl, line 2: no JSON: .*one object a line"}),
    File("list.jsonl", '{"text": "a"}\n["b"]\n', {"documents": r"list\.jsonl, line 2: must be a JSON object"}),
    File("nested.jsonl", '{"text": ["a"]}\n', {"documents": r"nested\.jsonl, line 1: 'text' must be text, got .*'a'"}),
    File("deep.json", "[" * 100_000, {"documents": r"deep\.json, line 1: no JSON"}),
    File("half.jsonl", '{"text": "a\\ud83d"}\n', {"documents": r"half\.jsonl, line 1: 'text' has half of a character"}),
    File("no_text.jsonl", '{"body": "a"}\n{"body": "b"}\n', {"documents": r"no_text\.jsonl has no column 'text'"}),
    # Parquet: types as they are stored.
    File("types.parquet", parquet({"text": ["a", "b"], "label": [2, 10]}), text_and_label([("a", "2"), ("b", "10")])),
    File("names.parquet", parquet({"text": ["a", "b"], "label": [1, 0]}, CLASSES), text_and_label([("a", "y"), ("b", "z")])),
    File("null.parquet", parquet({"text": ["a", "b"], "label": [0.0, None]}), {"classes": r"null\.parquet, row 2: 'label' is empty"}),
    File("minus.parquet", parquet({"text": ["a", "b"], "label": [1, -1]}, CLASSES), {"classes": r"minus\.parquet, row 2: 'label'"}),
    File("raw.parquet", raw_parquet({"text": ["a"], "size": [1], "label": [0.1]}), {"numbers": [("a", 1.0, 0.1)]}),
    File("no.parquet", "text,label\na,x\n", {"classes": r"no\.parquet is no parquet file"}),
    # Text: a file is a document.
    File("book.txt", "\ufeffone\r\ntwo\n", {"documents": [("one\ntwo\n",)], "classes": r"book\.txt has no column 'label'"}),
    File("latin.txt", "a\ncafé\n".encode("latin-1"), {"documents": r"latin\.txt, line 2: .*Save the file as UTF-8"}),
]  # fmt: skip


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_a_file_is_read_as_it_is_or_refused_with_its_line(file, load, tmp_path):
    path = tmp_path / file.name
    if callable(file.content):
        file.content(path)
    else:
        path.write_bytes(file.content if isinstance(file.content, bytes) else file.content.encode())
    for task, expected in file.outcomes.items():
        outcome, _ = load(task, file.name)
        if isinstance(expected, str):
            assert isinstance(outcome, str) and re.search(expected, outcome), (task, outcome)
        else:
            assert not isinstance(outcome, str), (task, outcome)
            np.testing.assert_equal(outcome, expected, err_msg=task)


def test_names_that_are_patterns_read_no_other_file(load, tmp_path):
    for number in ("1", "[1]"):
        (tmp_path / f"notes{number}.csv").write_text(f"text,label\nof notes{number},x\n")
    assert load("documents", "notes[1].csv")[0] == [("of notes[1]",)]
    assert "There is no file or folder 'notes?.csv'" in load("documents", "notes?.csv")[0]


def test_a_name_with_escapes_is_printed_as_text(load, tmp_path):
    name = "a\x1b[2J\nb.csv"
    (tmp_path / name).write_text("text,label\na,x\nb,y\n")
    outcome, printed = load("classes", name)
    assert outcome == [("a", "x"), ("b", "y")]
    assert r"a\x1b[2J b.csv" in printed and printed.replace("\n", "").isprintable()
    (tmp_path / name).write_text("text,label\na\n")
    assert r"a\x1b[2J b.csv, line 2" in load("classes", name)[0]


def test_incomplete_rows_are_left_out_if_one_says_so(load, tmp_path):
    (tmp_path / "a.csv").write_text('text,label\n"a\nb",x\n,y\nc,\nd,y\n')
    rows, printed = load("classes", "a.csv", "--drop_incomplete_rows", "True")
    assert rows == [("a\nb", "x"), ("d", "y")]
    assert "2 of 4 rows are incomplete and left out; the first: a.csv, line 4." in printed
    rows, printed = load("documents", "a.csv")
    assert len(rows) == 4
    assert "warning: a.csv, line 4: 'text' is empty; --drop_incomplete_rows leaves out rows without a text." in printed
    (tmp_path / "b.jsonl").write_text('{"text": "a", "label": null}\n')
    assert "b.jsonl has no complete row" in load("classes", "b.jsonl", "--drop_incomplete_rows", "True")[0]


def test_the_end_of_a_single_text_file_is_held_out(load, tmp_path):
    lines = [f"line {number:03d}\n" for number in range(100)]
    (tmp_path / "book.txt").write_text("".join(lines))
    rows, _ = load("documents", "book.txt", "--held_out_share", 0.1)
    assert rows == {"train": [("".join(lines[:90]),)], "validation": [("".join(lines[90:]),)]}


@pytest.mark.parametrize("ending", ["csv", "jsonl"])
def test_a_file_with_new_content_is_read_anew(load, tmp_path, ending):
    """Its size and its time of change are those of the old one, as after `cp -p` or `rsync`."""
    rows = {"csv": "text,label\n{},x\n", "jsonl": '{{"text": "{}", "label": "x"}}\n'}[ending]
    path = tmp_path / f"a.{ending}"
    for text in ("first", "again"):
        path.write_text(rows.format(text))
        os.utime(path, (1e9, 1e9))
        assert load("classes", path.name)[0] == [(text, "x")]


def png_of(width: int, height: int) -> bytes:
    """A PNG that claims a size, without pixels."""
    chunks = [b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0), b"IDAT"]
    lengths = [struct.pack(">I", len(chunk) - 4) for chunk in chunks]
    sums = [struct.pack(">I", zlib.crc32(chunk)) for chunk in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(part for each in zip(lengths, chunks, sums, strict=True) for part in each)


@pytest.fixture
def photos(tmp_path) -> Path:
    """Two classes, and what systems hide in folders."""
    for name, level in (("cat", 10), ("dog", 200)):
        (tmp_path / "photos" / name).mkdir(parents=True)
        Image.new("RGB", (9, 8), (level, 0, 0)).save(tmp_path / "photos" / name / "1.png")
        (tmp_path / "photos" / name / ".DS_Store").write_bytes(b"x")
    return tmp_path / "photos"


def reds(rows: list[tuple]) -> list[tuple[int, str]]:
    return [(image.convert("RGB").getpixel((0, 0))[0], label) for image, label in rows]


@pytest.mark.parametrize("name", ["photos", "photos/", "photos[1]", "ph*?{a,b}", "a b"])
def test_a_folder_of_images_has_a_folder_for_each_class(load, photos, name):
    photos.rename(photos.parent / name.strip("/")) if name.strip("/") != "photos" else None
    (photos.parent / "photos1" / "ape").mkdir(parents=True)
    assert reds(load("images", name)[0]) == [(10, "cat"), (200, "dog")]


def test_images_of_all_modes_are_read_and_rotated_as_they_say(load, photos):
    grey = Image.new("L", (4, 4), 77)
    grey.save(photos / "cat" / "2.JPG", quality=100)
    Image.new("RGBA", (4, 4), (77, 0, 0, 128)).save(photos / "cat" / "3.png")
    grey.convert("P").save(photos / "cat" / "4.gif")
    grey.convert("1").save(photos / "cat" / "5.bmp")
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = Image.new("RGB", (6, 4), (77, 0, 0))
    turned.save(photos / "cat" / "6.jpg", exif=exif)
    rows, _ = load("images", "photos")
    assert [label for _, label in rows] == ["cat"] * 6 + ["dog"]
    assert rows[1][0].getpixel((0, 0)) == 77
    assert rows[5][0].size == ImageOps.exif_transpose(Image.open(photos / "cat" / "6.jpg")).size == (4, 6)


def deep(path: Path) -> None:
    Image.fromarray(np.full((4, 4), 40_000, dtype=np.uint16)).save(path / "cat" / "2.png")


def broken(path: Path) -> None:
    content = (path / "cat" / "1.png").read_bytes()
    (path / "cat" / "2.png").write_bytes(content[:40])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (broken, r"photos/cat/2\.png is no image that can be read"),
        (lambda path: (path / "cat" / "2.png").write_text("text"), r"photos/cat/2\.png is no image that can be read"),
        (lambda path: (path / "cat" / "2.png").write_bytes(b""), r"photos/cat/2\.png is no image that can be read"),
        (lambda path: (path / "cat" / "2.png").write_bytes(png_of(60_000, 60_000)), r"cat/2\.png is no .*exceeds limit of"),
        (deep, r"photos/cat/2\.png has more than 8 bits a channel \(mode I;16\): save it with 8"),
        (lambda path: shutil.move(path / "cat" / "1.png", path), r"photos/1\.png is in no folder of a class.*photos/cat/1\.png"),
        (lambda path: (path / "ape").mkdir(), r"photos/ape has no images\. Put"),
        (lambda path: shutil.copytree(path / "cat", path / "dog" / "deep"), "photos/dog/deep is a folder in the folder of a class"),
        (lambda path: [shutil.rmtree(path / name) for name in ("cat", "dog")], "photos has no folders"),
    ],
)  # fmt: skip
def test_a_folder_of_images_is_refused_with_the_file(load, photos, change, message):
    change(photos)
    outcome, _ = load("images", "photos")
    assert isinstance(outcome, str) and re.search(message, outcome), outcome


def test_files_that_are_no_images_are_named(load, photos):
    (photos / "cat" / "notes.txt").write_text("a")
    (photos / "readme.md").write_text("a")
    rows, printed = load("images", "photos")
    assert len(rows) == 2
    assert "photos: 2 files are no images by their endings and are left out, such as photos/cat/notes.txt" in printed


def test_a_csv_names_images_relative_to_itself(load, photos, tmp_path):
    (photos / "list.csv").write_text("image,label\ndog/1.png,b\ncat/1.png,a\n")
    assert reds(load("images", "photos/list.csv")[0]) == [(200, "b"), (10, "a")]
    for row, message in (
        ("cat/2.png,a", r"photos/list\.csv, line 4: 'image' is no image that can be read: .*cat/2\.png"),
        (",a", r"photos/list\.csv, line 4: 'image' is empty"),
    ):
        (photos / "list.csv").write_text(f"image,label\ndog/1.png,b\ncat/1.png,a\n{row}\n")
        assert re.search(message, load("images", "photos/list.csv")[0])


def test_parquet_holds_images(load, photos, tmp_path):
    content = [(photos / name / "1.png").read_bytes() for name in ("cat", "dog")]
    rows = {"image": [{"bytes": each, "path": "a.png"} for each in content], "label": ["a", "b"]}
    raw_parquet(rows)(tmp_path / "raw.parquet")
    assert reds(load("images", "raw.parquet")[0]) == [(10, "a"), (200, "b")]
    rows["image"][1] = {"bytes": content[1][:40], "path": "a.png"}
    raw_parquet(rows)(tmp_path / "raw.parquet")
    assert re.search(r"raw\.parquet, row 2: 'image' is no image", load("images", "raw.parquet")[0])


def test_an_image_with_new_content_is_read_anew(load, photos):
    path = photos / "cat" / "1.png"
    for level in (10, 99):
        Image.new("RGB", (9, 8), (level, 0, 0)).save(path)
        os.utime(path, (1e9, 1e9))
        assert reds(load("images", "photos")[0])[0] == (level, "cat")


def test_a_local_data_set_with_new_content_is_read_anew(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "data"
    folder.mkdir()
    for text in ("first", "again"):
        for split in ("train", "validation"):
            (folder / f"{split}.jsonl").write_text(json.dumps({"text": text}) + "\n")
            os.utime(folder / f"{split}.jsonl", (1e9, 1e9))
        splits = scripts.load_splits(scripts.DataArguments(dataset_name=str(folder)), None, {"text": "text"}, seed=0)
        lengths = splits.map(lambda row: {"letters": [*row["text"]]})
        assert ["".join(row["letters"]) for row in lengths["train"]] == [text]
    folder.rename(tmp_path / "data[1]")
    with pytest.raises(ValueError, match=r"data\[1\]: `datasets` takes .* for a pattern. Rename the folder"):
        scripts.load_splits(
            scripts.DataArguments(dataset_name=str(tmp_path / "data[1]")), None, {"text": "text"}, seed=0
        )
