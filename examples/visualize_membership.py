"""Draw what a Token Statistics Transformer (ToST) sees in an image: Π, the membership of every patch in every head.

Token statistics has no pairwise attention to look at. Each patch distributes itself over the heads instead, and these
shares are what the model computes with (arXiv 2412.17810). The figure has a row for each chosen block: the head in
which each patch is most above the average patch, then every head's Π.

Without arguments: a photo of scikit-learn, and a small ToST trained in a minute or two to tell from where in
scikit-learn's two photos a crop comes. No network is needed.

    python examples/visualize_membership.py
    python examples/visualize_membership.py --model runs/photos --image dog.jpg --blocks 1 12 --shorter_side 384
"""

import argparse
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from embedded_data import photo_crops, sample_photos
from matplotlib.colors import ListedColormap
from PIL import Image
from training_utils import WeightDecayTrainer, accuracy_metrics
from transformers import (
    AutoModelForImageClassification,
    DefaultDataCollator,
    PreTrainedModel,
    TrainingArguments,
    set_seed,
)
from transformers.image_processing_utils import BaseImageProcessor

# The top-level name is missing from transformers 5.17 where torchvision is.
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from modeling_sumagg import ToSTConfig, ToSTForImageClassification
from modeling_sumagg.modeling_tost import tost_image_processor


def train_on_photo_crops(output_dir: str) -> None:
    """Train a small ToST on `photo_crops` and save it, with its image processor, to `output_dir`."""
    set_seed(0)
    crops = photo_crops()
    config = ToSTConfig(
        hidden_size=96,
        num_hidden_layers=4,
        num_attention_heads=6,
        patch_size=8,
        image_size=64,
        num_labels=crops["train"].features["label"].num_classes,
    )
    image_processor = tost_image_processor(config)

    def preprocess(batch: dict) -> dict:
        return {"pixel_values": image_processor(batch["image"])["pixel_values"], "labels": batch["label"]}

    trainer = WeightDecayTrainer(
        model=ToSTForImageClassification(config),
        args=TrainingArguments(
            output_dir,
            num_train_epochs=3,
            per_device_train_batch_size=32,
            per_device_eval_batch_size=100,
            learning_rate=2e-3,
            warmup_steps=0.1,
            lr_scheduler_type="cosine",
            weight_decay=0.05,
            logging_steps=50,
            save_strategy="no",
            remove_unused_columns=False,
            dataloader_pin_memory=torch.cuda.is_available(),
        ),
        train_dataset=crops["train"].with_transform(preprocess),
        processing_class=image_processor,
        data_collator=DefaultDataCollator(),
        compute_metrics=accuracy_metrics(),
    )
    trainer.train()
    accuracy = trainer.evaluate(crops["test"].with_transform(preprocess))["eval_accuracy"]
    trainer.save_model()
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
    figure, axes = plt.subplot_mosaic(
        grid, figsize=(width * (num_heads + 1), (height + 0.3) * len(grid)), layout="constrained"
    )
    for ax in axes.values():
        ax.set_axis_off()
    extent = (0, image.width, image.height, 0)
    axes["image"].imshow(image)
    axes["image"].set_title(f"{rows} x {columns} patches")
    axes["legend"].text(
        0.03,
        0.5,
        "Membership Π: how each patch divides itself among the heads\n\n"
        "Left: the head in which the patch is most above the average patch, in the colour of the head's title.\n"
        "Maps: Π of one head, from dark (low) to yellow (high). Above each, its 1st to 99th percentile\n"
        f"as a departure from the even share 1/{num_heads}: 0% throughout would tell no patch from another.",
        va="center",
        fontsize=11,
        linespacing=1.5,
        wrap=True,
    )
    colors = ListedColormap(plt.get_cmap("tab20" if num_heads > 10 else "tab10").colors[:num_heads])
    for block in blocks:
        shares = membership[block - 1]
        strongest = (shares / shares.mean(axis=(1, 2), keepdims=True)).argmax(axis=0)
        axes[f"{block} strongest"].imshow(image.convert("L"), cmap="gray")
        axes[f"{block} strongest"].imshow(
            strongest, cmap=colors, vmin=-0.5, vmax=num_heads - 0.5, alpha=0.6, extent=extent
        )
        axes[f"{block} strongest"].set_title(f"block {block}")
        for head, share in enumerate(shares):
            low, high = np.percentile(share, [1, 99])
            axes[f"{block} {head}"].imshow(share, cmap="viridis", vmin=low, vmax=high, extent=extent)
            axes[f"{block} {head}"].set_title(
                f"head {head + 1}: {low * num_heads - 1:+.1%} to {high * num_heads - 1:+.1%}",
                fontsize=10,
                color=colors(head),
            )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a ToST checkpoint: a folder or a Hub id (default: train a small one)")
    parser.add_argument("--image", help="an image file (default: the photo of scikit-learn named china)")
    parser.add_argument(
        "--shorter_side", type=int, default=224, help="pixels; patches are counted on the resized image"
    )
    parser.add_argument("--blocks", type=int, nargs="+", help="blocks to draw, from 1 (default: first, middle, last)")
    parser.add_argument("--output_path", type=Path, default=Path("runs/membership/membership.png"))
    arguments = parser.parse_args()

    checkpoint = arguments.model
    if checkpoint is None:
        checkpoint = str(arguments.output_path.parent)
        train_on_photo_crops(checkpoint)
    model = AutoModelForImageClassification.from_pretrained(checkpoint)
    image_processor = AutoImageProcessor.from_pretrained(checkpoint)
    image = sample_photos()["china"] if arguments.image is None else Image.open(arguments.image).convert("RGB")

    num_blocks = model.config.num_hidden_layers
    blocks = arguments.blocks or sorted({1, (num_blocks + 1) // 2, num_blocks})
    if not set(blocks) <= set(range(1, num_blocks + 1)):
        parser.error(f"--blocks must be between 1 and {num_blocks}, the blocks of {checkpoint}, got {blocks}")
    image, membership = memberships(model, image_processor, image, arguments.shorter_side)
    draw(image, membership, blocks, arguments.output_path)
    print(f"Drawn: {arguments.output_path}")


if __name__ == "__main__":
    main()
