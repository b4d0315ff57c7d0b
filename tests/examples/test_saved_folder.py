"""The page on the files in a saved folder: it names all that are written, and what it says may be deleted may be."""

import fnmatch
import re
import shutil
from pathlib import Path

import pytest
from PIL import Image
from running import EXAMPLES, config_overrides, run_alone
from transformers import (
    AutoImageProcessor,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoProcessor,
    AutoTokenizer,
    GenerationConfig,
)


ROWS = re.findall(
    r"^\| (`.+?`.*?) \|.*\| ([^|]+) \|$", (EXAMPLES / "saved_folder.md").read_text(encoding="utf-8"), re.MULTILINE
)
MAY_BE_DELETED = {name: answer.startswith("yes") for names, answer in ROWS for name in re.findall(r"`([^`]+)`", names)}


def patterns(path: Path) -> list[str]:
    return [pattern for pattern in MAY_BE_DELETED if fnmatch.fnmatch(path.name, pattern)]


def delete_what_may_be(folder: Path) -> set[str]:
    """The names of the page that were deleted."""
    deleted = set()
    for path in list(folder.iterdir()):
        for pattern in patterns(path):
            if MAY_BE_DELETED[pattern]:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
                deleted.add(pattern)
    return deleted


@pytest.fixture(scope="module")
def folders(tmp_path_factory, csv_files, short_run, in_a_clean_process) -> dict[str, Path]:
    """What the scripts wrote: a language model with checkpoints, adapters of it, a classifier of images, a recogniser."""
    place = tmp_path_factory.mktemp("saved")
    checkpoints = ["--save_strategy", "steps", "--save_steps", 3]
    text = [*short_run, *csv_files, "--block_size", 24]
    whole = run_alone("run_clm.py", place, *text, *checkpoints, *config_overrides("sumagg"), output_dir="whole")
    adapters = run_alone(
        "run_clm.py", place, *text, "--model_name_or_path", "whole", "--lora_rank", 2, output_dir="adapters"
    )
    for label, shade in (("day", 230), ("night", 20)):
        (place / "photos" / label).mkdir(parents=True)
        for n in range(6):
            Image.new("RGB", (32, 32), (shade + n,) * 3).save(place / "photos" / label / f"{n}.png")
    images = run_alone(
        "run_image_classification.py", place, "--train_dir", "photos", "--max_steps", 2, "--held_out_share", 0.4,
        output_dir="images",
    )  # fmt: skip
    speech = run_alone(
        "run_speech_recognition_ctc.py", place, "--max_steps", 2, "--num_train_utterances", 16,
        "--num_held_out_utterances", 4, output_dir="speech",
    )  # fmt: skip
    return {"whole": whole.folder, "adapters": adapters.folder, "images": images.folder, "speech": speech.folder}


def test_every_file_that_is_written_is_on_the_page(folders):
    found = {path for folder in folders.values() for path in folder.iterdir()}
    assert not [path for path in sorted(found) if len(patterns(path)) != 1]
    # And what is on the page is written by something.
    written = {pattern for path in found for pattern in patterns(path)}
    elsewhere = {"predictions.png", "test_results.json", "model-00001-of-0000N.safetensors", "training_args.bin"}
    assert set(MAY_BE_DELETED) - written <= elsewhere


def test_what_may_be_deleted_is_not_needed(folders, tmp_path):
    text, images = (shutil.copytree(folders[name], tmp_path / name) for name in ("whole", "images"))
    deleted = delete_what_may_be(text) | delete_what_may_be(images)
    assert {"generation_config.json", "*.py", "README.md", "checkpoint-*"} <= deleted
    tokenizer, model = AutoTokenizer.from_pretrained(text), AutoModelForCausalLM.from_pretrained(text)
    generated = model.generate(**tokenizer("cat", return_tensors="pt"), max_new_tokens=3)
    assert generated.shape[1] > 1
    # As the page says of the file that is gone.
    assert GenerationConfig.from_pretrained(folders["whole"]).eos_token_id is not None
    photo = AutoImageProcessor.from_pretrained(images)(Image.new("RGB", (40, 32)), return_tensors="pt")
    assert AutoModelForImageClassification.from_pretrained(images)(**photo).logits.shape == (1, 2)


@pytest.mark.parametrize("name", [name for name, yes in MAY_BE_DELETED.items() if not yes])
def test_without_the_others_it_is_not_the_same(folders, tmp_path, name):
    folder = next((folder for folder in folders.values() if list(folder.glob(name))), None)
    if folder is None:
        assert name == "model-00001-of-0000N.safetensors"
        return
    copy = shutil.copytree(folder, tmp_path / "copy")
    delete_what_may_be(copy)
    (copy / name).unlink()
    if name.startswith("tokenizer"):
        # transformers makes another one.
        before, after = (AutoTokenizer.from_pretrained(place) for place in (folder, copy))
        text = "meow purr"
        assert (before(text)["input_ids"], before.pad_token) != (after(text)["input_ids"], after.pad_token)
        return
    with pytest.raises((OSError, ValueError, KeyError, TypeError)):
        if (folder / "preprocessor_config.json").exists():
            AutoImageProcessor.from_pretrained(copy)
            AutoModelForImageClassification.from_pretrained(copy)
        elif (folder / "processor_config.json").exists():
            AutoProcessor.from_pretrained(copy)
        else:
            AutoModelForCausalLM.from_pretrained(copy)
