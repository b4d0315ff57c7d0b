"""Train a Token Statistics Transformer (ToST) to classify images with `Trainer`, and compare it with simple baselines.

Without arguments: a small ToST on the handwritten digits of scikit-learn, which needs no network.

    python examples/run_image_classification.py
    python examples/run_image_classification.py --train_dir photos/train --test_dir photos/test \
        --preset tost-tiny-12-p16 --output_dir runs/photos --num_train_epochs 100
    python examples/run_image_classification.py --train_dir photos/train --model_name_or_path runs/photos
"""

import json
from dataclasses import dataclass, field
from pathlib import Path

import torch
from datasets import ClassLabel, DatasetDict, load_dataset
from embedded_data import handwritten_digits
from sklearn.dummy import DummyClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from training_utils import (
    WeightDecayTrainer,
    accuracy_metrics,
    check_reload,
    parse_arguments,
    plot_training,
    save_model_card,
)
from transformers import (
    AutoConfig,
    AutoModelForImageClassification,
    DefaultDataCollator,
    PreTrainedConfig,
    TrainingArguments,
    pipeline,
    set_seed,
)

# The top-level name is missing from transformers 5.17 where torchvision is.
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from modeling_sumagg import ToSTConfig
from modeling_sumagg.configuration import preset_path
from modeling_sumagg.modeling_tost import tost_image_processor


# A model for a minute or two on two cores; `--config_overrides` changes it.
SMALL_MODEL = {
    "hidden_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "patch_size": 8,
    "image_size": 32,
}


@dataclass
class ModelArguments:
    model_name_or_path: str | None = field(
        default=None, metadata={"help": "A checkpoint to fine-tune: a folder or a Hub id."}
    )
    preset: str | None = field(
        default=None, metadata={"help": "A named architecture to train from scratch, such as tost-tiny-12-p16."}
    )
    config_overrides: str = field(
        default="{}",
        metadata={"help": 'Config values to replace, as JSON: \'{"image_size": 64, "drop_path_rate": 0.1}\'.'},
    )

    def __post_init__(self):
        if self.model_name_or_path is not None and self.preset is not None:
            raise ValueError("Give --model_name_or_path or --preset, not both.")


@dataclass
class DataArguments:
    dataset_name: str | None = field(default=None, metadata={"help": "A data set of the Hub, or a local folder."})
    dataset_config_name: str | None = field(default=None, metadata={"help": "The data set's configuration."})
    train_dir: str | None = field(default=None, metadata={"help": "A folder with one folder of images a class."})
    test_dir: str | None = field(default=None, metadata={"help": "The same for the held-out images."})
    image_column_name: str = field(default="image", metadata={"help": "Column with the images."})
    label_column_name: str = field(default="label", metadata={"help": "Column with the classes."})
    held_out_share: float = field(
        default=0.1, metadata={"help": "Share of the training images split off for each missing held-out split."}
    )

    def __post_init__(self):
        if self.dataset_name is not None and self.train_dir is not None:
            raise ValueError("Give --dataset_name or --train_dir, not both.")
        if self.test_dir is not None and self.train_dir is None:
            raise ValueError("--test_dir needs a --train_dir.")

    @property
    def source(self) -> str:
        return self.dataset_name or self.train_dir or "scikit-learn's handwritten digits"


def load_images(arguments: DataArguments, seed: int) -> DatasetDict:
    """`train`, `validation` and `test` with the columns `image` and `label`."""
    if arguments.dataset_name is not None:
        splits = load_dataset(arguments.dataset_name, arguments.dataset_config_name)
    elif arguments.train_dir is not None:
        folders = {"train": arguments.train_dir, "test": arguments.test_dir}
        splits = load_dataset("imagefolder", data_files={k: f"{v}/**" for k, v in folders.items() if v is not None})
    else:
        splits = handwritten_digits()
    splits = splits.select_columns([arguments.image_column_name, arguments.label_column_name])
    splits = splits.rename_columns({arguments.image_column_name: "image", arguments.label_column_name: "label"})
    if not isinstance(splits["train"].features["label"], ClassLabel):
        splits = splits.class_encode_column("label")
    for name in ("test", "validation"):
        if name not in splits:
            parts = splits["train"].train_test_split(arguments.held_out_share, stratify_by_column="label", seed=seed)
            splits["train"], splits[name] = parts["train"], parts["test"]
    return splits


def load_config(arguments: ModelArguments, labels: list[str]) -> PreTrainedConfig:
    """The config of the checkpoint, of the preset, or of a small ToST, with the overrides and the labels in it."""
    values = {
        **json.loads(arguments.config_overrides),
        "num_labels": len(labels),
        "id2label": dict(enumerate(labels)),
        "label2id": {label: index for index, label in enumerate(labels)},
    }
    if arguments.model_name_or_path is not None:
        return AutoConfig.from_pretrained(arguments.model_name_or_path, **values)
    if arguments.preset is not None:
        return ToSTConfig(**{**json.loads(Path(preset_path(arguments.preset)).read_text(encoding="utf-8")), **values})
    return ToSTConfig(**{**SMALL_MODEL, **values})


def baseline_accuracies(splits: DatasetDict) -> dict[str, dict[str, float]]:
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
        name: {
            split: classifier.fit(x["train"], y["train"]).score(x[split], y[split]) for split in ("validation", "test")
        }
        for name, classifier in baselines.items()
    }


def main() -> None:
    model_arguments, data_arguments, training_arguments = parse_arguments(
        (ModelArguments, DataArguments, TrainingArguments),
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
    set_seed(training_arguments.seed)

    splits = load_images(data_arguments, training_arguments.seed)
    config = load_config(model_arguments, splits["train"].features["label"].names)
    if config.num_channels != 3:
        raise ValueError(
            f"num_channels must be 3, got {config.num_channels}: the pipeline with which this script uses the trained "
            "model hands every image over in RGB."
        )
    if model_arguments.model_name_or_path is not None:
        image_processor = AutoImageProcessor.from_pretrained(model_arguments.model_name_or_path)
        # Another set of classes gets a new head.
        model = AutoModelForImageClassification.from_pretrained(
            model_arguments.model_name_or_path, config=config, ignore_mismatched_sizes=True
        )
    else:
        image_processor = tost_image_processor(config)
        model = AutoModelForImageClassification.from_config(config)
    print(f"{type(model).__name__}, {model.num_parameters():,} parameters; {splits.num_rows} images")

    def preprocess(batch: dict) -> dict:
        return {"pixel_values": image_processor(batch["image"])["pixel_values"], "labels": batch["label"]}

    processed = splits.with_transform(preprocess)
    trainer = WeightDecayTrainer(
        model=model,
        args=training_arguments,
        train_dataset=processed["train"],
        eval_dataset=processed["validation"],
        processing_class=image_processor,
        data_collator=DefaultDataCollator(),
        compute_metrics=accuracy_metrics(),
    )
    training = trainer.train(resume_from_checkpoint=training_arguments.resume_from_checkpoint)
    trainer.save_model()
    trainer.save_state()
    trainer.log_metrics("train", training.metrics)
    trainer.save_metrics("train", training.metrics)
    accuracies = {}
    for split, prefix in (("validation", "eval"), ("test", "test")):
        metrics = trainer.evaluate(processed[split], metric_key_prefix=prefix)
        trainer.log_metrics(prefix, metrics)
        trainer.save_metrics(prefix, metrics)
        accuracies[split] = metrics[f"{prefix}_accuracy"]
    if not trainer.is_world_process_zero():
        return

    baselines = baseline_accuracies(processed)
    output_dir = Path(training_arguments.output_dir)
    references = {name: values["validation"] for name, values in baselines.items()}
    plot_training(trainer.state.log_history, "accuracy", references, output_dir / "training.png")
    save_model_card(
        trainer,
        data_arguments.source,
        {"accuracy": accuracies["test"]},
        {name: {"accuracy": values["test"]} for name, values in baselines.items()},
    )
    images = splits["test"][:64]["image"]
    reloaded = check_reload(AutoModelForImageClassification, trainer, image_processor(images, return_tensors="pt"))
    classifier = pipeline("image-classification", model=str(output_dir))
    predictions = reloaded(**image_processor(images, return_tensors="pt").to(reloaded.device)).logits.argmax(dim=-1)
    if [result[0]["label"] for result in classifier(images)] != [config.id2label[i] for i in predictions.tolist()]:
        raise RuntimeError(f"The image-classification pipeline of {output_dir} gives other classes than its model.")

    print("\nAccuracy" + "".join(f"{split:>14}" for split in accuracies))
    for name, values in {type(model).__name__: accuracies, **baselines}.items():
        print("        " + "".join(f"{values[split]:14.2%}" for split in accuracies) + f"  {name}")
    better = [name for name, values in baselines.items() if values["test"] >= accuracies["test"]]
    if better:
        print(f"The model is no better than: {', '.join(better)}.")
    print(
        f"Saved in {output_dir}, reloaded, and used by a pipeline; loss and accuracy by step: {output_dir}/training.png"
    )


if __name__ == "__main__":
    main()
