"""Where a run writes to is looked at before anything else."""

import json
import os
import sys
from pathlib import Path

import pytest

from modeling_sumagg.training.scripts import ModelArguments, parse_arguments


@pytest.fixture
def parse(tmp_path, monkeypatch):
    """Parse a command line in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str):
        monkeypatch.setattr(sys, "argv", ["run.py", *arguments])
        return parse_arguments([ModelArguments], "Trains.\n\nMore.", output_dir="runs/out")[-1]

    return run


def write(path: str, text: str = "mine") -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(text)


def test_a_new_folder_is_made(parse):
    assert parse().output_dir == "runs/out" and Path("runs/out").is_dir() and not any(Path("runs/out").iterdir())
    assert parse("--output_dir", "other").output_dir == "other"


@pytest.mark.parametrize("path", ["runs/out", "runs"])
def test_a_file_is_no_folder(parse, path):
    write(path)
    with pytest.raises(ValueError, match=f"{path} is a file and not a folder"):
        parse()
    assert Path(path).read_text() == "mine"


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_a_folder_that_cannot_be_written_to_is_refused(parse):
    Path("runs/out").mkdir(parents=True)
    Path("runs/out").chmod(0o500)
    with pytest.raises(ValueError, match="runs/out cannot be written to"):
        parse()


@pytest.mark.parametrize("name", ["README.md", "config.json", "tokenizer.json", "training.png", "model.safetensors"])
def test_files_of_somebody_else_are_kept(parse, name):
    write(f"runs/out/{name}")
    with pytest.raises(ValueError, match=f"runs/out holds {name}, which no training run wrote"):
        parse()
    assert Path("runs/out", name).read_text() == "mine"


def test_an_earlier_run_is_replaced_with_a_word_and_its_checkpoints_are_not(parse, capsys):
    write("runs/out/config.json", json.dumps({"transformers_version": "5.0"}))
    parse()
    assert capsys.readouterr().out == "runs/out holds the model of an earlier run, which this run will replace.\n"
    for step in (9, 10):
        write(f"runs/out/checkpoint-{step}/trainer_state.json", "{}")
    with pytest.raises(ValueError, match="runs/out holds checkpoint-10 of an earlier run: resume it with"):
        parse()
    resumed = parse("--resume_from_checkpoint", "last")
    assert Path(resumed.resume_from_checkpoint) == Path("runs/out/checkpoint-10")
    assert parse("--resume_from_checkpoint", "runs/out/checkpoint-9").resume_from_checkpoint == "runs/out/checkpoint-9"
    assert capsys.readouterr().out == ""


def test_a_checkpoint_that_was_not_written_whole_is_skipped(parse):
    write("runs/out/checkpoint-10/model.safetensors")
    write("runs/out/checkpoint-11/trainer_state.json", '{"global_step": 1')
    assert parse().resume_from_checkpoint is None
    with pytest.raises(ValueError, match="--resume_from_checkpoint last: runs/out holds no checkpoint"):
        parse("--resume_from_checkpoint", "last")
    write("runs/out/checkpoint-9/trainer_state.json", "{}")
    resumed = parse("--resume_from_checkpoint", "last")
    assert Path(resumed.resume_from_checkpoint) == Path("runs/out/checkpoint-9")


def test_a_checkpoint_to_resume_from_has_to_be_there(parse):
    with pytest.raises(ValueError, match="--resume_from_checkpoint last: runs/out holds no checkpoint"):
        parse("--resume_from_checkpoint", "last")
    with pytest.raises(ValueError, match="--resume_from_checkpoint: nowhere is no checkpoint of `Trainer`"):
        parse("--resume_from_checkpoint", "nowhere")


def test_help_explains_the_options_of_the_script_and_names_those_of_trainer(parse, capsys):
    with pytest.raises(SystemExit, match="0"):
        parse("--help")
    printed = capsys.readouterr().out
    assert printed.startswith("usage: run.py [options]\n\nTrains.\n\n")
    assert printed.index("A checkpoint to start from") < printed.index("--output_dir runs/out")
    assert "--gradient_checkpointing" in printed and "More." not in printed
    assert not Path("runs").exists()
