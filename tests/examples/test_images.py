"""The image examples: their data, the membership figure, and the default training run."""

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from testing import assert_close, build
from transformers import pipeline

from modeling_sumagg import ToSTConfig, ToSTForImageClassification
from modeling_sumagg.modeling_tost import tost_image_processor


for requirement in ("datasets", "evaluate", "matplotlib", "sklearn"):
    pytest.importorskip(requirement)

EXAMPLES = Path(__file__).parents[2] / "examples"


def test_digits_are_split_once_and_for_all():
    from embedded_data import handwritten_digits
    from sklearn.datasets import load_digits

    splits, again = handwritten_digits(), handwritten_digits()
    assert splits.num_rows == {"train": 1257, "validation": 180, "test": 360}
    digits = load_digits()
    shares = Counter(digits.target.tolist())
    for name, split in splits.items():
        assert split["label"][:] == again[name]["label"][:]
        for label, count in Counter(split["label"]).items():
            assert abs(count - shares[label] * len(split) / 1797) < 1
    drawn = Counter((np.asarray(row["image"]).tobytes(), row["label"]) for split in splits.values() for row in split)
    levels = np.round(digits.images * 255 / 16).astype(np.uint8)
    assert drawn == Counter((image.tobytes(), label) for image, label in zip(levels, digits.target, strict=True))


def test_crops_are_the_same_in_every_run():
    from embedded_data import photo_crops

    crops, again = photo_crops(num_train=20, num_test=5), photo_crops(num_train=20, num_test=5)
    assert crops.num_rows == {"train": 20, "test": 5}
    assert crops["train"].features["label"].num_classes == 24
    for row, other in zip(crops["train"], again["train"], strict=True):
        assert row["label"] == other["label"] and row["image"].size == (64, 64)
        assert row["image"].tobytes() == other["image"].tobytes()


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    config = ToSTConfig(hidden_size=32, num_hidden_layers=3, num_attention_heads=4, patch_size=8, image_size=32)
    build(ToSTForImageClassification, config).save_pretrained(tmp_path / "checkpoint")
    tost_image_processor(config).save_pretrained(tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


def test_membership_keeps_the_shape_of_the_image(checkpoint):
    from visualize_membership import memberships

    model = ToSTForImageClassification.from_pretrained(checkpoint)
    photo = Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 60, 3), dtype=np.uint8))
    image, membership = memberships(model, tost_image_processor(model.config), photo, shorter_side=33)
    assert image.size == (32, 48)
    assert membership.shape == (3, 4, 6, 4)
    assert_close(torch.from_numpy(membership).sum(1), torch.ones(3, 6, 4))


def test_membership_figure_of_a_checkpoint(checkpoint, tmp_path, monkeypatch, capsys):
    import visualize_membership

    path = tmp_path / "figures" / "membership.png"
    arguments = ["--model", str(checkpoint), "--shorter_side", "48", "--output_path", str(path)]
    monkeypatch.setattr(sys, "argv", ["visualize_membership.py", *arguments])
    visualize_membership.main()
    figure = np.asarray(Image.open(path).convert("RGB"))
    assert figure.shape[0] > 500 and figure.shape[1] > 1000
    # The photo, the maps and their colours, not an empty page.
    assert len(np.unique(figure.reshape(-1, 3), axis=0)) > 1000

    monkeypatch.setattr(sys, "argv", ["visualize_membership.py", *arguments, "--blocks", "0", "4"])
    with pytest.raises(SystemExit):
        visualize_membership.main()
    assert "--blocks must be between 1 and 3" in capsys.readouterr().err


def test_folders_of_images_are_classes_and_a_checkpoint_gets_a_head_for_them(run_script, tmp_path, checkpoint, capsys):
    """The held-out folder has two of three classes, and not the first: its classes are still those of the training."""
    levels = {"black": 0, "grey": 120, "white": 250}
    draw = np.random.default_rng(0)
    for split, names in (("train", levels), ("test", ("grey", "white"))):
        for name in names:
            (tmp_path / split / name).mkdir(parents=True)
            for index in range(12):
                pixels = np.full((20, 24, 3), levels[name]) + draw.integers(0, 6, (20, 24, 3))
                Image.fromarray(pixels.astype(np.uint8)).save(tmp_path / split / name / f"{index}.png")
    folder = run_script(
        "run_image_classification.py", "--train_dir", tmp_path / "train", "--test_dir", tmp_path / "test",
        "--model_name_or_path", checkpoint, "--max_steps", 30, "--per_device_train_batch_size", 16,
        "--learning_rate", 3e-3, "--disable_tqdm", True,
    )  # fmt: skip
    assert json.loads((folder / "all_results.json").read_text())["test_accuracy"] == 1.0
    classifier = pipeline("image-classification", model=str(folder))
    assert classifier.model.config.id2label == dict(enumerate(levels))
    assert classifier(Image.new("RGB", (30, 30), (252, 252, 252)))[0]["label"] == "white"
    assert "most frequent class" in capsys.readouterr().out


@pytest.mark.slow
def test_default_run_reads_digits(tmp_path):
    command = [sys.executable, str(EXAMPLES / "run_image_classification.py"), "--output_dir", str(tmp_path)]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert json.loads((tmp_path / "test_results.json").read_text())["test_accuracy"] >= 0.95
    assert "is no better than" not in output
    for name in ("model.safetensors", "preprocessor_config.json", "training.png", "README.md"):
        assert (tmp_path / name).stat().st_size > 0
