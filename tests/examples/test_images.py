"""The image examples: their data, the membership figure, and their training runs."""

import importlib.util
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from running import EXAMPLES, assert_card_is_true, metrics, run_alone
from testing import assert_close, build
from transformers import pipeline

from modeling_sumagg import SumAggConfig, ToSTConfig, ToSTForImageClassification
from modeling_sumagg.models.modeling_tost import tost_image_processor
from modeling_sumagg.training.embedded_data import handwritten_digits, photo_crops


def test_digits_are_split_once_and_for_all():
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


@pytest.fixture(scope="module")
def visualize_membership():
    spec = importlib.util.spec_from_file_location("visualize_membership", EXAMPLES / "visualize_membership.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_membership_keeps_the_shape_of_the_image(visualize_membership, checkpoint):
    model = ToSTForImageClassification.from_pretrained(checkpoint)
    photo = Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 60, 3), dtype=np.uint8))
    image_processor = tost_image_processor(model.config)
    image, membership = visualize_membership.memberships(model, image_processor, photo, shorter_side=33)
    assert image.size == (32, 48)
    assert membership.shape == (3, 4, 6, 4)
    assert_close(torch.from_numpy(membership).sum(1), torch.ones(3, 6, 4))


def test_membership_figure_of_a_checkpoint(checkpoint, tmp_path, error_of):
    arguments = ["--model", checkpoint, "--shorter_side", 48, "--output_path", "figures/membership.png"]
    run = run_alone("visualize_membership.py", tmp_path, *arguments, output_dir="")
    assert run.printed.startswith("Draws its memberships over a photo as figures/membership.png.")
    figure = np.asarray(Image.open(tmp_path / "figures" / "membership.png").convert("RGB"))
    assert figure.shape[0] > 500 and figure.shape[1] > 1000
    # The photo, the maps and their colours, not an empty page.
    assert len(np.unique(figure.reshape(-1, 3), axis=0)) > 1000

    script = "visualize_membership.py"
    error = error_of(script, *arguments, "--blocks", 0, 4, output_dir="")
    assert re.search(r"--blocks must be between 1 and 3, the blocks of .*got \[0, 4\]", error)
    assert "'nothing.png'" in error_of(script, "--image", "nothing.png", output_dir="")
    SumAggConfig().save_pretrained(tmp_path / "text")
    assert "text is no ToST for images" in error_of(script, "--model", "text", output_dir="")


def test_a_picture_replaces_no_image_and_no_folder(visualize_membership, tmp_path):
    image = tmp_path / "photo.png"
    image.write_bytes(b"mine")
    visualize_membership.check_picture(tmp_path / "drawn.svg", str(image))
    (tmp_path / "link.png").symlink_to(image)
    (tmp_path / "folder.png").mkdir()
    for path, message in {
        tmp_path / "link.png": "is the image itself",
        tmp_path / "folder.png": "is a folder",
        tmp_path / "model.safetensors": r"must end in one of \.png, \.pdf",
    }.items():
        with pytest.raises(ValueError, match=message):
            visualize_membership.check_picture(path, str(image))


def test_one_scale_a_row_shows_how_little_heads_differ(visualize_membership, tmp_path, monkeypatch):
    """Heads that differ by 1 % and by 50 %, on bars that say so."""
    pattern = np.linspace(-1, 1, 24).reshape(1, 4, 6) * np.array([1, -1])[:, None, None]
    membership = np.stack([(1 + 0.01 * pattern) / 2, (1 + 0.5 * pattern) / 2])
    figures = []
    figure_class = visualize_membership.Figure
    monkeypatch.setattr(
        visualize_membership, "Figure", lambda **options: figures.append(figure_class(**options)) or figures[0]
    )
    visualize_membership.draw(Image.new("RGB", (48, 32)), membership, [1, 2], tmp_path / "a.png")
    bars = [axes for axes in figures[0].axes if axes.get_label() == "<colorbar>"]
    assert [bar.get_ylim()[1] for bar in bars] == pytest.approx([0.01, 0.5], rel=0.1)
    ticks = [[tick.get_text() for tick in bar.get_yticklabels()] for bar in bars]
    assert "1.00%" in ticks[0] and "40%" in ticks[1] and min(map(len, ticks)) >= 4


@pytest.fixture
def photos(tmp_path) -> Path:
    """The held-out folder has two of three classes, and not the first: its classes are still those of the training."""
    levels = {"black": 0, "grey": 120, "white": 250}
    draw = np.random.default_rng(0)
    for split, names in (("train", levels), ("test", ("grey", "white"))):
        for name in names:
            (tmp_path / split / name).mkdir(parents=True)
            for index in range(12):
                pixels = np.full((20, 24, 3), levels[name]) + draw.integers(0, 6, (20, 24, 3))
                Image.fromarray(pixels.astype(np.uint8)).save(tmp_path / split / name / f"{index}.png")
    return tmp_path


def test_folders_of_images_are_classes_and_a_checkpoint_gets_a_head_for_them(run_script, photos, checkpoint):
    arguments = [
        "--train_dir", "train", "--test_dir", "test", "--max_steps", 30, "--per_device_train_batch_size", 16,
        "--learning_rate", 3e-3, "--eval_strategy", "no", "--disable_tqdm", True,
    ]  # fmt: skip
    run = run_script("run_image_classification.py", *arguments, "--model_name_or_path", checkpoint)
    assert metrics(run.folder)["test_accuracy"] == 1.0
    classifier = pipeline("image-classification", model=str(run.folder))
    assert classifier.model.config.id2label == {0: "black", 1: "grey", 2: "white"}
    assert classifier(Image.new("RGB", (30, 30), (252, 252, 252)))[0]["label"] == "white"
    baselines = ["most frequent class", "logistic regression on 8 x 8 pixels"]
    # A tenth of the 12 images of each of the three classes is held out.
    card = assert_card_is_true(run.folder, run.printed, {"accuracy": 1.0}, baselines, data="train, 32 examples")
    assert (card.measured_on, card.num_examples) == ("test", 24)
    assert card.data.base_model == "checkpoint" and card.training["started from"] == "`checkpoint`"

    # Adapted to what it knows already: the merged model is as good.
    adapted = run_script(
        "run_image_classification.py", *arguments, "--model_name_or_path", run.folder, "--lora_rank", 4,
        "--max_steps", 5, output_dir="adapted",
    )  # fmt: skip
    assert metrics(adapted.folder)["test_accuracy"] == 1.0
    merged = pipeline("image-classification", model=str(adapted.folder / "merged"))
    assert merged(Image.new("RGB", (30, 30), (252, 252, 252)))[0]["label"] == "white"


def test_a_broken_image_and_a_missing_folder_are_named_before_training(error_of, photos):
    path = photos / "train" / "grey" / "3.png"
    path.write_bytes(path.read_bytes()[:200])
    script = "run_image_classification.py"
    assert re.search(r"train/grey/3.png is no image that can be read", error_of(script, "--train_dir", "train"))
    assert "There is no file or folder 'nowhere'." in error_of(script, "--train_dir", "nowhere")


@pytest.mark.slow
def test_default_run_reads_digits(run_script):
    run = run_script("run_image_classification.py", "--disable_tqdm", True)
    assert metrics(run.folder)["test_accuracy"] >= 0.95
    assert "is no better than" not in run.printed
    for name in ("model.safetensors", "preprocessor_config.json", "training.png", "README.md"):
        assert (run.folder / name).stat().st_size > 0


@pytest.mark.full_training
def test_default_run_draws_memberships(tmp_path, in_a_clean_process):
    run = run_alone("visualize_membership.py", tmp_path, output_dir="")
    right = float(re.search(r"([\d.]+)% of 500 other crops", run.printed).group(1))
    assert right > 70
    folder = tmp_path / "runs" / "membership"
    assert (folder / "membership.png").exists() and "most frequent cell" in (folder / "README.md").read_text()
