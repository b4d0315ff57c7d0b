"""What cannot be converted ends in one line that says what is wrong and what to do, and leaves the folder as it was."""

import runpy
import sys
import threading
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from modeling_sumagg import __main__
from modeling_sumagg.publishing import conversion as converter


GOLDEN = Path(__file__).parent / "golden"


def weights(name: str) -> dict[str, torch.Tensor]:
    with safe_open(GOLDEN / f"{name}.safetensors", framework="pt") as file:
        return {key.removeprefix("weights."): file.get_tensor(key) for key in file.keys() if "weights." in key}


def write_empty(path: Path) -> None:
    path.touch()


def write_truncated(path: Path) -> None:
    save = save_file if path.suffix == ".safetensors" else torch.save
    save(weights("sumagg_pure"), path)
    path.write_bytes(path.read_bytes()[:-1])


def write_text(path: Path) -> None:
    path.write_text("version https://git-lfs.github.com/spec/v1")


DAMAGED = r"is damaged, cut off, or no \.\w+ file\. Compare its size, [\d,]+ bytes, with that of its source, and"
FILES = {
    "empty": ("original.pt", write_empty, r"original\.pt is empty: download or copy it again"),
    "empty safetensors": ("original.safetensors", write_empty, r"is empty: download or copy it again"),
    "truncated": ("original.pth", write_truncated, rf"original\.pth cannot be read \(\w+\): it {DAMAGED} download"),
    "truncated safetensors": ("original.safetensors", write_truncated, DAMAGED),
    "text": ("original.pt", write_text, DAMAGED),
    "text safetensors": ("original.safetensors", write_text, DAMAGED),
    "a tensor": (
        "original.pt",
        lambda path: torch.save(torch.ones(2, 3), path),
        r"one Tensor of shape \[2, 3\], and not",
    ),
    "a list": ("original.pt", lambda path: torch.save([1], path), r"holds a list, and not tensors by name: save them"),
    "under model": (
        "original.pt",
        lambda path: torch.save({"model": 1}, path),
        "holds a int, and not tensors by name",
    ),
    "no tensors": (
        "original.pt",
        lambda path: torch.save({"epoch": 1}, path),
        "no tensor 'token_embedding.weight'. It has 0",
    ),
    "one dimension": (
        "original.pt",
        lambda path: torch.save({"token_embedding.weight": torch.ones(2)}, path),
        "cannot be converted as a sumagg checkpoint",
    ),
    "code": (
        "original.pt",
        lambda path: torch.save({"token_embedding.weight": Path("x")}, path),
        r"objects of the class pathlib\.\w+, and a checkpoint's code is not run: load it where you trust it",
    ),
    "folder": ("original", lambda path: path.mkdir(), "original is a folder: give the checkpoint's file"),
    "missing": ("original.pt", lambda path: None, r"There is no file .*original\.pt"),
    "another kind": ("original.bin", write_text, r"must be a \.safetensors, \.pt or \.pth file, got .*original\.bin"),
}


@pytest.fixture
def run(tmp_path):
    """Run the command line converter; the one line that it ends with."""

    def run(family: str, path: Path, *arguments: str) -> str:
        command = [
            "--model_family",
            family,
            "--checkpoint_path",
            str(path),
            "--output_dir",
            str(tmp_path / "converted"),
        ]
        with pytest.raises(SystemExit) as raised:
            __main__.main(["convert", *command, *arguments])
        message = raised.value.code
        assert isinstance(message, str) and message.startswith("error: ") and "\n" not in message
        assert not (tmp_path / "converted").exists()
        return message

    return run


@pytest.mark.parametrize("kind", FILES)
def test_files_that_are_no_checkpoint(kind, run, tmp_path):
    name, write, reason = FILES[kind]
    write(tmp_path / name)
    with pytest.raises(ValueError, match=reason):
        raise ValueError(run("sumagg", tmp_path / name))


def test_a_number_of_heads_that_does_not_fit(run, tmp_path):
    torch.save(weights("tost_vision_p16"), tmp_path / "original.pth")
    message = run("tost", tmp_path / "original.pth", "--num_attention_heads", "8")
    assert "with num_attention_heads=8 (their shapes tell that it is 4: leave it out)" in message
    assert "size mismatch for tost.encoder.layers.0.attention.temperature" in message
    save_file(weights("sumagg_hybrid"), tmp_path / "original.safetensors")
    message = run("sumagg", tmp_path / "original.safetensors", "--num_attention_heads", "5")
    assert "`num_attention_heads` must divide `hidden_size`, got 5" in message


@pytest.mark.parametrize("text", [None, "{", "[]", '{"first": "cat"}'])
def test_labels_that_are_none(text, run, tmp_path):
    torch.save(weights("tost_vision_p16"), tmp_path / "original.pth")
    labels = tmp_path / "labels.json"
    if text is not None:
        labels.write_text(text)
    message = run("tost", tmp_path / "original.pth", "--id2label", str(labels))
    assert f'{labels} must be a JSON file with the name of every class, {{"0": "cat", …}}' in message


def test_a_folder_that_cannot_be_written(run, tmp_path, monkeypatch):
    save_file(weights("sumagg_pure"), tmp_path / "original.safetensors")

    def save_half(self, folder, **kwargs):
        (Path(folder) / "model.safetensors").write_bytes(b"half of")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(PreTrainedModel, "save_pretrained", save_half)
    assert "No space left on device" in run("sumagg", tmp_path / "original.safetensors")


def test_a_file_in_the_place_of_the_folder(tmp_path):
    save_file(weights("sumagg_pure"), tmp_path / "original.safetensors")
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="file is a file: give the name of a folder"):
        converter.convert_original_checkpoint("sumagg", tmp_path / "original.safetensors", tmp_path / "file")


def test_a_folder_that_holds_something_is_refused_and_stays(tmp_path):
    """The source of the conversion among other things: nothing is replaced, whatever it is."""
    folder = tmp_path / "converted"
    folder.mkdir()
    save_file(weights("sumagg_pure"), folder / "original.safetensors")
    (folder / "README.md").write_text("mine")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    reason = (
        "converted is not empty, it holds README.md, original.safetensors: give the name of a new folder, or empty"
    )
    with pytest.raises(ValueError, match=reason):
        converter.convert_original_checkpoint("sumagg", folder / "original.safetensors", folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_an_empty_folder_is_written_and_stays_the_same_folder(tmp_path, monkeypatch):
    """As a folder must that is mounted, or the current one."""
    save_file(weights("sumagg_pure"), tmp_path / "original.safetensors")
    (tmp_path / "converted").mkdir()
    before = (tmp_path / "converted").stat().st_ino
    monkeypatch.chdir(tmp_path / "converted")
    converter.convert_original_checkpoint("sumagg", tmp_path / "original.safetensors", ".")
    assert (tmp_path / "converted").stat().st_ino == before
    assert {"config.json", "model.safetensors"} <= {path.name for path in Path().iterdir()}
    assert not list(Path().glob(".*"))


def test_of_two_conversions_into_one_folder_one_is_refused(tmp_path):
    save_file(weights("sumagg_pure"), tmp_path / "original.safetensors")
    save_file({**weights("sumagg_pure")}, tmp_path / "other.safetensors")
    barrier, results = threading.Barrier(2), []

    def convert(name: str) -> None:
        barrier.wait()
        try:
            converter.convert_original_checkpoint("sumagg", tmp_path / name, tmp_path / "converted")
            results.append("converted")
        except (OSError, ValueError) as error:
            results.append(str(error))

    threads = [
        threading.Thread(target=convert, args=(name,)) for name in ("original.safetensors", "other.safetensors")
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    results.sort()
    assert results.count("converted") == 1 and any("is not empty" in it or "another process" in it for it in results)
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path / "converted")).__name__ == "SumAggForCausalLM"


def test_a_family_without_an_original_format_is_refused(tmp_path):
    with pytest.raises(SystemExit, match="error: `model_family` must be one of sumagg, tost, tost_text, got 'gpt2'"):
        __main__.main(
            ["convert", "--model_family", "gpt2", "--checkpoint_path", "x.pt", "--output_dir", str(tmp_path)]
        )


def test_the_command_ends_without_a_traceback(tmp_path, monkeypatch):
    """In this process; that Python then prints one line and ends with 1 is tested for the command `check`."""
    (tmp_path / "original.pt").touch()
    arguments = ["--model_family", "tost", "--checkpoint_path", "original.pt", "--output_dir", "converted"]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["modeling_sumagg", "convert", *arguments])
    with pytest.raises(SystemExit) as ending:
        runpy.run_module("modeling_sumagg", run_name="__main__")
    assert ending.value.code == "error: original.pt is empty: download or copy it again."
    assert not (tmp_path / "converted").exists()


def test_the_command_of_0_2_advises_and_converts(tmp_path, monkeypatch, capsys):
    save_file(weights("sumagg_pure"), tmp_path / "original.safetensors")
    arguments = ["--model_family", "sumagg", "--checkpoint_path", "original.safetensors", "--output_dir", "converted"]
    monkeypatch.chdir(tmp_path)
    __main__.main(__main__.arguments_of_today("modeling_sumagg.convert_original_checkpoint", arguments))
    printed = capsys.readouterr()
    assert "convert_original_checkpoint` is now `python -m modeling_sumagg convert`.\n" in printed.err
    assert printed.out.startswith("converted: SumAggForCausalLM, ")
