"""Train a Token Statistics Transformer (ToST) to classify images with `Trainer`, and compare it with simple baselines.

Without arguments: a small ToST on the handwritten digits of scikit-learn, which needs no network.

    python run_image_classification.py
    python run_image_classification.py --train_dir photos/train --test_dir photos/test \
        --preset tost-tiny-12-p16 --output_dir runs/photos --num_train_epochs 100
    python run_image_classification.py --train_dir photos/train --model_name_or_path runs/photos
    python run_image_classification.py --train_dir photos/train --model_name_or_path runs/photos --lora_rank 8

A csv may name the images too, relative to it: `--train_file photos.csv --image_column_name file`. Images are made as small
as the model takes them, 32 x 32 pixels by default.
"""

import os
from dataclasses import dataclass, field
from statistics import median


# Threads that wait for each other sleep, and leave the processor to others: read when torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch
from datasets import Dataset, DatasetDict
from sklearn.dummy import DummyClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from transformers import (
    AutoModelForImageClassification,
    DefaultDataCollator,
    EvalPrediction,
    PreTrainedConfig,
)

# The top-level name is missing from transformers 5.17 where torchvision is.
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from modeling_sumagg.models.modeling_tost import tost_image_processor
from modeling_sumagg.training.embedded_data import handwritten_digits
from modeling_sumagg.training.runs import Results, report, train_and_evaluate
from modeling_sumagg.training.scripts import (
    DecayTrainer,
    LabelledDataArguments,
    ModelArguments,
    add_adapters,
    encode_labels,
    load_config,
    load_model,
    load_splits,
    parse_arguments,
    run,
    source_of,
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


def say_how_small(train: Dataset, config: PreTrainedConfig) -> None:
    """Print how far the images are made smaller, where they are."""
    sizes = [image.size for image in train.select(range(min(50, len(train))))["image"]]
    width, height = (median(sides) for sides in zip(*sizes, strict=True))
    if min(width, height) > config.image_size:
        print(
            f"Images of {width:.0f} x {height:.0f} pixels become {config.image_size} x {config.image_size}. Larger ones "
            """take longer: --preset tost-tiny-12-p16, or --config_overrides '{"image_size": 64}'."""
        )


def accuracy(outputs: EvalPrediction) -> dict[str, float]:
    return {"accuracy": accuracy_score(outputs.label_ids, outputs.predictions.argmax(axis=1))}


def baseline_results(splits: DatasetDict) -> Results:
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
    results: Results = {}
    for name, classifier in classifiers.items():
        classifier.fit(x["train"], y["train"])
        results[name] = {s: {"accuracy": classifier.score(x[s], y[s])} for s in splits if s != "train"}
    return results


def main() -> None:
    with user_errors():
        data_arguments, model_arguments, training_arguments = parse_arguments(
            (ImageArguments, ModelArguments),
            __doc__,
            output_dir="runs/image-classification",
            num_train_epochs=20,
            per_device_train_batch_size=64,
            per_device_eval_batch_size=256,
            learning_rate=1e-3,
            weight_decay=0.05,
            eval_strategy="epoch",
            logging_strategy="epoch",
            remove_unused_columns=False,
        )
        is_own = data_arguments.dataset_name or data_arguments.train_file
        source = source_of(data_arguments, "scikit-learn's handwritten digits")
        duration = "the progress bar shows how long" if is_own else "about a minute on two cores"
        print(
            f"Trains a classifier of images on {source} and saves it to {training_arguments.output_dir} ({duration})."
        )
        columns = {"image": data_arguments.image_column_name, "label": data_arguments.label_column_name}
        splits = load_splits(
            data_arguments, handwritten_digits, columns, seed=training_arguments.seed, embedded_name=source
        )
        splits, names = encode_labels(splits)
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
    say_how_small(splits["train"], config)

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
    held_out = {name: split for name, split in images.items() if name != "train"}
    results = train_and_evaluate(trainer, held_out, ["accuracy"])
    if trainer.is_world_process_zero():
        report(
            trainer,
            AutoModelForImageClassification,
            results | baseline_results(images),
            held_out,
            base_model=model_arguments.model_name_or_path,
        )


if __name__ == "__main__":
    run(main)
