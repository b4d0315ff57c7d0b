"""Train a Token Statistics Transformer (ToST) to classify images with `Trainer`, and compare it with simple baselines.

Without arguments: a small ToST on the handwritten digits of scikit-learn, which needs no network.

    python run_image_classification.py
    python run_image_classification.py --train_dir photos/train --test_dir photos/test \
        --preset tost-tiny-12-p16 --output_dir runs/photos --num_train_epochs 100
    python run_image_classification.py --train_dir photos/train --model_name_or_path runs/photos
    python run_image_classification.py --train_dir photos/train --model_name_or_path runs/photos --lora_rank 8
"""

import io
import os
from dataclasses import dataclass, field
from pathlib import Path


# Threads that wait for each other sleep, and leave the processor to others: read when torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch
from datasets import DatasetDict, Image
from PIL import Image as PILImage
from sklearn.dummy import DummyClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from transformers import (
    AutoModelForImageClassification,
    DefaultDataCollator,
    EvalPrediction,
    HfArgumentParser,
    TrainingArguments,
    set_seed,
)

# The top-level name is missing from transformers 5.17 where torchvision is.
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from modeling_sumagg.modeling_tost import tost_image_processor
from modeling_sumagg.training.embedded_data import handwritten_digits
from modeling_sumagg.training.plots import plot_training
from modeling_sumagg.training.scripts import (
    DecayTrainer,
    LabelledDataArguments,
    ModelArguments,
    add_adapters,
    encode_labels,
    load_config,
    load_model,
    load_splits,
    save_checked,
    user_errors,
)


# A model for a minute or two on two cores; `--config_overrides` changes it.
SMALL_MODEL = {
    "model_type": "tost",
    "hidden_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "patch_size": 8,
    "image_size": 32,
}


@dataclass
class ImageArguments(LabelledDataArguments):
    image_column_name: str = field(default="image", metadata={"help": "Column with the images."})


def check_images(splits: DatasetDict) -> None:
    """
    Raises:
        ValueError: an image cannot be read; the message names its file, or its row.
    """
    for name, split in splits.items():
        for row, image in enumerate(split.cast_column("image", Image(decode=False))["image"]):
            try:
                PILImage.open(image["path"] if image["bytes"] is None else io.BytesIO(image["bytes"])).load()
            except (OSError, SyntaxError) as error:
                place = image["path"] or f"Row {row} of the {name} split"
                raise ValueError(f"{place} is no image that can be read: {error}.") from error


def accuracy(outputs: EvalPrediction) -> dict[str, float]:
    return {"accuracy": accuracy_score(outputs.label_ids, outputs.predictions.argmax(axis=1))}


def baseline_accuracies(splits: DatasetDict) -> dict[str, dict[str, float]]:
    """
    Accuracy on each held-out split of the most frequent class, and of a logistic regression on the model's own input,
    averaged to 8 x 8 pixels.

    Args:
        splits (`DatasetDict`): preprocessed, with `pixel_values` and `labels`.
    """
    x, y = {}, {}
    for name, split in splits.items():
        images = [torch.as_tensor(row["pixel_values"]) for row in split]
        x[name] = torch.stack([torch.nn.functional.adaptive_avg_pool2d(image, 8).flatten() for image in images])
        y[name] = split.with_format(None)["labels"][:]
    classifiers = {
        "most frequent class": DummyClassifier(strategy="most_frequent"),
        "logistic regression on 8 x 8 pixels": make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000)),
    }
    accuracies = {}
    for name, classifier in classifiers.items():
        classifier.fit(x["train"], y["train"])
        accuracies[name] = {split: classifier.score(x[split], y[split]) for split in splits if split != "train"}
    return accuracies


def main() -> None:
    parser = HfArgumentParser(
        (ModelArguments, ImageArguments, TrainingArguments),
        description=__doc__.partition("\n\n")[0],
        usage="%(prog)s [options]",
        allow_abbrev=False,
    )
    parser.set_defaults(
        output_dir="runs/image-classification",
        num_train_epochs=20,
        per_device_train_batch_size=64,
        per_device_eval_batch_size=256,
        learning_rate=1e-3,
        lr_scheduler_type="cosine",
        warmup_steps=0.1,
        weight_decay=0.05,
        eval_strategy="epoch",
        logging_strategy="epoch",
        save_strategy="no",
        remove_unused_columns=False,
        report_to="none",
        dataloader_pin_memory=torch.accelerator.is_available(),
        # PEFT hides the names of the labels.
        label_names=["labels"],
    )
    with user_errors():
        model_arguments, data_arguments, training_arguments = parser.parse_args_into_dataclasses()
        source = data_arguments.dataset_name or data_arguments.train_file
        folder = Path(training_arguments.output_dir)
        duration = "the progress bar shows how long" if source else "about a minute on two cores"
        source = source or "scikit-learn's handwritten digits"
        print(f"Trains a classifier of images on {source} and saves it to {folder} ({duration}).")
        set_seed(training_arguments.seed)
        columns = {"image": data_arguments.image_column_name, "label": data_arguments.label_column_name}
        splits = load_splits(data_arguments, handwritten_digits, columns, seed=training_arguments.seed)
        splits, names = encode_labels(splits)
        check_images(splits)
        labels = {"id2label": dict(enumerate(names)), "label2id": {name: index for index, name in enumerate(names)}}
        config = load_config(model_arguments, SMALL_MODEL, **labels)
        if config.num_channels != 3:
            raise ValueError(f"num_channels must be 3, got {config.num_channels}: pipelines hand images over in RGB.")
        if model_arguments.model_name_or_path is None:
            image_processor = tost_image_processor(config)
        else:
            image_processor = AutoImageProcessor.from_pretrained(model_arguments.model_name_or_path)
        model = load_model(AutoModelForImageClassification, model_arguments, config)

    print(f"{type(model).__name__}, {model.num_parameters():,} parameters; {splits.num_rows} images, classes {names}")

    def preprocess(batch: dict[str, list]) -> dict[str, list]:
        return {"pixel_values": image_processor(batch["image"])["pixel_values"], "labels": batch["labels"]}

    images = splits.with_transform(preprocess)
    if model_arguments.lora_rank:
        # The batch norms of the patch embedding move while training.
        model = add_adapters(model, model_arguments, modules_to_save=["classifier", "patch_embeddings"])
    trainer = DecayTrainer(
        model=model,
        args=training_arguments,
        train_dataset=images["train"],
        eval_dataset=images["validation"],
        processing_class=image_processor,
        data_collator=DefaultDataCollator(),
        compute_metrics=accuracy,
    )
    held_out = [split for split in images if split != "train"]
    baselines = {}
    if model_arguments.lora_rank:
        trainer.evaluate()
        baselines["before training"] = {
            split: trainer.predict(images[split]).metrics["test_accuracy"] for split in held_out
        }
    resume = training_arguments.resume_from_checkpoint
    metrics = {"train": trainer.train(resume_from_checkpoint=True if resume == "last" else resume).metrics}
    trainer.save_model()
    trainer.save_state()
    accuracies = {}
    for split in held_out:
        prefix = "eval" if split == "validation" else split
        metrics[prefix] = trainer.evaluate(images[split], metric_key_prefix=prefix)
        accuracies[split] = metrics[prefix][f"{prefix}_accuracy"]
    for prefix, values in metrics.items():
        trainer.save_metrics(prefix, values)
    if not trainer.is_world_process_zero():
        return

    baselines |= baseline_accuracies(images)
    save_checked(
        trainer,
        AutoModelForImageClassification,
        dataset_name=f"{source}, {held_out[-1]} split",
        metrics={"accuracy": accuracies[held_out[-1]]},
        baselines={name: {"accuracy": by_split[held_out[-1]]} for name, by_split in baselines.items()},
    )
    plot_training(
        trainer.state.log_history,
        folder / "training.png",
        metric="accuracy",
        baselines={name: by_split["validation"] for name, by_split in baselines.items()},
        model_name=type(model).__name__,
    )

    print(f"\nAccuracy {''.join(f'{split:>12}' for split in held_out)}")
    for name, by_split in {"this model": accuracies, **baselines}.items():
        print(f"         {''.join(f'{by_split[split]:12.2%}' for split in held_out)}  {name}")
    better = [name for name, by_split in baselines.items() if by_split[held_out[-1]] >= accuracies[held_out[-1]]]
    if better:
        print(f"The model is no better than: {', '.join(better)}.")
    print(f"Saved to {folder}; training.png shows loss and accuracy by step.")


if __name__ == "__main__":
    main()
