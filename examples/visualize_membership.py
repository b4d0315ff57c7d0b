"""Draw what a Token Statistics Transformer (ToST) sees in an image: Π, the membership of every patch in every head.

Token statistics has no pairwise attention to look at. Each patch distributes itself over the heads instead, and these
shares are what the model computes with (arXiv 2412.17810). The figure has a row for each chosen block: the head in
which each patch is most above the average patch, then every head's Π.

Without arguments: a photo of scikit-learn, and a small ToST trained in a minute or two to tell from where in
scikit-learn's two photos a crop comes. No network is needed.

    python visualize_membership.py
    python visualize_membership.py --model runs/photos --image dog.jpg --blocks 1 12 --shorter_side 384
"""

import argparse
import os
import sys
from pathlib import Path


# Threads that wait for each other sleep, and leave the processor to others: read when torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter
from PIL import Image
from sklearn.metrics import accuracy_score
from transformers import (
    AutoConfig,
    AutoModelForImageClassification,
    BaseImageProcessor,
    DefaultDataCollator,
    PreTrainedModel,
    TrainingArguments,
    set_seed,
)

# The top-level name is missing from transformers 5.17 where torchvision is.
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from modeling_sumagg import ToSTConfig, ToSTForImageClassification
from modeling_sumagg.models.modeling_tost import tost_image_processor
from modeling_sumagg.publishing.hub import save_model_card
from modeling_sumagg.training.data_files import open_image
from modeling_sumagg.training.embedded_data import photo_crops, sample_photos
from modeling_sumagg.training.scripts import DecayTrainer, check_output_folder, run, user_errors


# What matplotlib writes, as the name of the file says.
FORMATS = (".png", ".pdf", ".svg", ".jpg")


def train_on_photo_crops(output_dir: Path) -> None:
    """Train a small ToST on `photo_crops` and save it, with its image processor and its card, to `output_dir`."""
    set_seed(0)
    crops = photo_crops()
    labels = crops["train"].features["label"]
    config = ToSTConfig(
        hidden_size=96,
        num_hidden_layers=4,
        num_attention_heads=6,
        patch_size=8,
        image_size=64,
        id2label=dict(enumerate(labels.names)),
        label2id={name: index for index, name in enumerate(labels.names)},
    )
    image_processor = tost_image_processor(config)

    def preprocess(batch: dict) -> dict:
        return {"pixel_values": image_processor(batch["image"])["pixel_values"], "labels": batch["label"]}

    trainer = DecayTrainer(
        model=ToSTForImageClassification(config),
        args=TrainingArguments(
            str(output_dir),
            num_train_epochs=3,
            per_device_train_batch_size=32,
            per_device_eval_batch_size=100,
            learning_rate=2e-3,
            warmup_steps=0.1,
            lr_scheduler_type="cosine",
            weight_decay=0.05,
            logging_steps=50,
            save_strategy="no",
            report_to="none",
            remove_unused_columns=False,
            dataloader_pin_memory=torch.accelerator.is_available(),
        ),
        train_dataset=crops["train"].with_transform(preprocess),
        processing_class=image_processor,
        data_collator=DefaultDataCollator(),
        compute_metrics=lambda outputs: {
            "accuracy": accuracy_score(outputs.label_ids, outputs.predictions.argmax(axis=1))
        },
    )
    trainer.train()
    accuracy = trainer.evaluate(crops["test"].with_transform(preprocess))["eval_accuracy"]
    trainer.save_model()
    # Paths of this machine are in it, and nothing reads it.
    (output_dir / "training_args.bin").unlink()
    most_frequent = np.bincount(crops["train"]["label"]).argmax()
    save_model_card(
        trainer.model,
        output_dir,
        dataset_name=f"{len(crops['train']):,} crops of scikit-learn's two sample photos, by the cell that they are from",
        evaluated_on="other crops of the two photos",
        num_examples=len(crops["test"]),
        metrics={"accuracy": accuracy},
        baselines={
            "most frequent cell": {"accuracy": float(np.mean(np.array(crops["test"]["label"]) == most_frequent))}
        },
        hyperparameters={"learning_rate": trainer.args.learning_rate, "weight_decay": trainer.args.weight_decay},
        steps=trainer.state.global_step,
    )
    print(f"{accuracy:.1%} of {len(crops['test'])} other crops placed in the right one of {config.num_labels} cells.")


def memberships(
    model: PreTrainedModel, image_processor: BaseImageProcessor, image: Image.Image, shorter_side: int
) -> tuple[Image.Image, np.ndarray]:
    """
    The image resized to whole patches, its shorter side about `shorter_side` pixels, and Π over its patches, [blocks,
    heads, rows, columns].
    """
    patch_size = model.config.patch_size
    scale = shorter_side / min(image.size)
    columns, rows = (max(1, round(side * scale / patch_size)) for side in image.size)
    image = image.resize((columns * patch_size, rows * patch_size), Image.Resampling.BICUBIC)
    inputs = image_processor(image, do_resize=False, do_center_crop=False, return_tensors="pt")
    with torch.no_grad():
        outputs = model(**inputs, output_attentions=True)
    return image, torch.cat(outputs.attentions).unflatten(2, (rows, columns)).numpy()


def draw(image: Image.Image, membership: np.ndarray, blocks: list[int], path: Path) -> None:
    """The image with a legend, then one row for each of `blocks` (from 1): strongest heads, and Π of every head."""
    num_heads, rows, columns = membership.shape[1:]
    height = 1.7
    width = max(height * image.width / image.height, height)
    grid = [["image"] + ["legend"] * num_heads]
    grid += [[f"{block} strongest"] + [f"{block} {head}" for head in range(num_heads)] for block in blocks]
    figure = Figure(figsize=(width * (num_heads + 1) + 1, (height + 0.3) * len(grid)), layout="constrained")
    axes = figure.subplot_mosaic(grid)
    for ax in axes.values():
        ax.set_axis_off()
    extent = (0, image.width, image.height, 0)
    axes["image"].imshow(image)
    axes["image"].set_title(f"{rows} x {columns} patches")
    axes["legend"].text(
        0.03,
        0.5,
        "Membership Π: how each patch divides itself among the heads\n\n"
        f"Maps: how far Π of a head is above (red) or below (blue) the even share 1/{num_heads}, on the scale of their\n"
        "row. A row whose scale ends at 1% hardly tells its patches apart.\n"
        "Left: the head in which a patch is most above the average patch, in the colour of the head's title; the more it\n"
        "is, the denser.",
        va="center",
        fontsize=11,
        linespacing=1.5,
    )
    colors = np.array(colormaps["tab20" if num_heads > 10 else "tab10"].colors)
    # Of each patch in each head, its share over that of the average patch.
    excess = membership / membership.mean(axis=(2, 3), keepdims=True) - 1
    densest = max(np.percentile(excess[block - 1].max(axis=0), 99) for block in blocks)
    for block in blocks:
        strongest = excess[block - 1].argmax(axis=0)
        density = np.clip(excess[block - 1].max(axis=0) / densest, 0, 1)[..., None]
        axes[f"{block} strongest"].imshow(image.convert("L"), cmap="gray", alpha=0.4)
        axes[f"{block} strongest"].imshow(np.concatenate((colors[strongest], density), axis=-1), extent=extent)
        axes[f"{block} strongest"].set_title(f"block {block}")
        departure = membership[block - 1] * num_heads - 1
        limit = np.percentile(np.abs(departure), 99)
        for head, values in enumerate(departure):
            axes[f"{block} {head}"].set_title(f"head {head + 1}", fontsize=10, color=colors[head])
            shown = axes[f"{block} {head}"].imshow(values, cmap="RdBu_r", vmin=-limit, vmax=limit, extent=extent)
        bar = figure.colorbar(shown, ax=[axes[f"{block} {head}"] for head in range(num_heads)], pad=0.01, aspect=12)
        bar.locator = MaxNLocator(nbins=5)
        bar.formatter = PercentFormatter(xmax=1)
        bar.set_label(f"above 1/{num_heads}")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def check_picture(path: Path, image: str | None) -> None:
    """Raise where the picture would replace the image that it is drawn from, or something that is no picture."""
    if path.suffix not in FORMATS:
        raise ValueError(f"--output_path must end in one of {', '.join(FORMATS)}, got {path}.")
    if path.is_dir():
        raise ValueError(f"{path} is a folder: give --output_path the name of a file in it.")
    if image is not None and path.exists() and path.samefile(image):
        raise ValueError(f"--output_path is the image itself, {path}, which would be overwritten: give another name.")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--model", help="a ToST checkpoint: a folder or a Hub id (default: train a small one)")
    parser.add_argument("--image", help="an image file (default: the photo of scikit-learn named china)")
    parser.add_argument(
        "--shorter_side", type=int, default=224, help="pixels; patches are counted on the resized image"
    )
    parser.add_argument("--blocks", type=int, nargs="+", help="blocks to draw, from 1 (default: first, middle, last)")
    parser.add_argument("--output_path", type=Path, default=Path("runs/membership/membership.png"))
    arguments = parser.parse_args()

    task = "Trains a small ToST (about two minutes on two cores) and draws" if arguments.model is None else "Draws"
    print(f"{task} its memberships over {arguments.image or 'a photo'} as {arguments.output_path}.")
    checkpoint = arguments.model or arguments.output_path.parent
    with user_errors():
        check_picture(arguments.output_path, arguments.image)
        if arguments.model is None:
            check_output_folder(checkpoint)
        image = sample_photos()["china"] if arguments.image is None else open_image(arguments.image).convert("RGB")
        if arguments.model is not None and AutoConfig.from_pretrained(checkpoint).model_type != ToSTConfig.model_type:
            raise ValueError(f"{checkpoint} is no ToST for images: no other model has memberships of patches.")
    if arguments.model is None:
        train_on_photo_crops(checkpoint)
    model = AutoModelForImageClassification.from_pretrained(checkpoint)
    image_processor = AutoImageProcessor.from_pretrained(checkpoint)

    num_blocks = model.config.num_hidden_layers
    blocks = arguments.blocks or sorted({1, (num_blocks + 1) // 2, num_blocks})
    if not set(blocks) <= set(range(1, num_blocks + 1)):
        sys.exit(f"error: --blocks must be between 1 and {num_blocks}, the blocks of {checkpoint}, got {blocks}.")
    image, membership = memberships(model, image_processor, image, arguments.shorter_side)
    draw(image, membership, blocks, arguments.output_path)
    print(f"Drawn: {arguments.output_path}")


if __name__ == "__main__":
    run(main)
