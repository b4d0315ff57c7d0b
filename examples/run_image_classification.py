"""Train a Token Statistics Transformer (ToST) to classify images with `Trainer`, and compare it with simple baselines.

Without arguments: a small ToST on the handwritten digits of scikit-learn, which needs no network.

    python examples/run_image_classification.py
    python examples/run_image_classification.py --train_dir photos/train --test_dir photos/test \
        --preset tost-tiny-12-p16 --output_dir runs/photos --num_train_epochs 100
    python examples/run_image_classification.py --train_dir photos/train --model_name_or_path runs/photos
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from datasets import Dataset, DatasetDict
from embedded_data import handwritten_digits
from sklearn.dummy import DummyClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from training_utils import (
    LabelledDataArguments,
    ModelArguments,
    Task,
    accuracy_metrics,
    build_trainer,
    label_indices,
    label_maps,
    label_names,
    load_config,
    load_model,
    load_splits,
    parse_arguments,
    report,
    train_and_evaluate,
)
from transformers import (
    AutoModelForImageClassification,
    DefaultDataCollator,
    TrainingArguments,
    pipeline,
    set_seed,
)

# The top-level name is missing from transformers 5.17 where torchvision is.
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from modeling_sumagg.modeling_tost import tost_image_processor


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
    embedded_source: ClassVar[str] = "scikit-learn's handwritten digits"

    image_column_name: str = field(default="image", metadata={"help": "Column with the images."})


def baseline_accuracies(splits: DatasetDict, held_out: Iterable[str]) -> dict[str, dict[str, float]]:
    """
    Accuracy on each held-out split of the most frequent class, and of a logistic regression on the model's own input,
    averaged to 8 x 8 pixels.

    Args:
        splits (`DatasetDict`): preprocessed, with `pixel_values` and `labels`.
    """
    x, y = {}, {}
    for name, split in splits.items():
        images = [torch.as_tensor(example["pixel_values"]) for example in split]
        x[name] = torch.stack([torch.nn.functional.adaptive_avg_pool2d(image, 8).flatten() for image in images])
        y[name] = [example["labels"] for example in split]
    baselines = {
        "most frequent class": DummyClassifier(strategy="most_frequent"),
        "logistic regression on 8 x 8 pixels": make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000)),
    }
    return {
        name: {split: classifier.fit(x["train"], y["train"]).score(x[split], y[split]) for split in held_out}
        for name, classifier in baselines.items()
    }


def prepare(
    model_arguments: ModelArguments, data_arguments: ImageArguments, training_arguments: TrainingArguments
) -> Task:
    columns = {"image": data_arguments.image_column_name, "label": data_arguments.label_column_name}
    splits = load_splits(data_arguments, handwritten_digits, columns, training_arguments.seed)
    names = label_names(splits)
    config = load_config(model_arguments, SMALL_MODEL, **label_maps(names))
    if config.num_channels != 3:
        raise ValueError(
            f"num_channels must be 3, got {config.num_channels}: the pipeline with which this script uses the trained "
            "model hands every image over in RGB."
        )
    if model_arguments.model_name_or_path is not None:
        image_processor = AutoImageProcessor.from_pretrained(model_arguments.model_name_or_path)
    else:
        image_processor = tost_image_processor(config)
    model = load_model(AutoModelForImageClassification, model_arguments, config)
    print(f"{type(model).__name__}, {model.num_parameters():,} parameters; {splits.num_rows} images")
    indices = label_indices(splits, names)

    def preprocess(batch: dict[str, list]) -> dict[str, list]:
        labels = [indices[label] for label in batch["label"]]
        return {"pixel_values": image_processor(batch["image"])["pixel_values"], "labels": labels}

    processed = splits.with_transform(preprocess)
    held_out = {split: processed[split] for split in ("validation", "test") if split in processed}
    return Task(
        auto_class=AutoModelForImageClassification,
        model=model,
        processing_class=image_processor,
        train_dataset=processed["train"],
        held_out=held_out,
        trainer_arguments={"data_collator": DefaultDataCollator(), "compute_metrics": accuracy_metrics()},
        source=data_arguments.source,
        metric="accuracy",
        baselines=lambda: baseline_accuracies(processed, held_out),
    )


def check_pipeline(folder: str, processed: Dataset) -> None:
    """Raise a `RuntimeError` if the image-classification pipeline gives other classes than the model it has."""
    classifier = pipeline("image-classification", model=folder)
    rows = processed.select(range(min(len(processed), 64)))
    pixel_values = torch.stack([torch.as_tensor(row["pixel_values"]) for row in rows])
    with torch.no_grad():
        predicted = classifier.model(pixel_values.to(classifier.device)).logits.argmax(dim=-1)
    images = rows.with_format(None)["image"][:]
    labels = [classifier.model.config.id2label[index] for index in predicted.tolist()]
    if [result[0]["label"] for result in classifier(images)] != labels:
        raise RuntimeError(f"The image-classification pipeline of {folder} gives other classes than its model.")


def main() -> None:
    arguments = parse_arguments(
        (ModelArguments, ImageArguments, TrainingArguments),
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
    )
    training_arguments = arguments[-1]
    set_seed(training_arguments.seed)
    task = prepare(*arguments)
    trainer = build_trainer(task, training_arguments)
    accuracies = train_and_evaluate(trainer, task)
    if trainer.is_world_process_zero():
        report(trainer, task, accuracies)
        check_pipeline(training_arguments.output_dir, task.held_out["validation"])


if __name__ == "__main__":
    main()
