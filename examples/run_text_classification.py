"""Train a classifier of long documents with `Trainer`, from scratch or from a causal language model, and compare it
with simple baselines.

Without arguments: which package of Python's standard library a piece of code is from, which needs no network.

    python examples/run_text_classification.py
    python examples/run_text_classification.py --train_file a.csv --validation_file b.csv
    python examples/run_text_classification.py --model_name_or_path runs/clm --output_dir runs/from-pretrained
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from datasets import DatasetDict
from embedded_data import standard_library_packages
from sklearn.dummy import DummyClassifier
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from training_utils import (
    SMALL_MODEL,
    DataArguments,
    ModelArguments,
    WeightDecayTrainer,
    accuracy_metrics,
    check_reload,
    load_config,
    load_model,
    load_splits,
    load_tokenizer,
    parse_arguments,
    plot_training,
    save_model_card,
)
from transformers import (
    AutoModelForSequenceClassification,
    DataCollatorWithPadding,
    PreTrainedTokenizerBase,
    TrainingArguments,
    set_seed,
)


# The published classifier, no blocks at all, but for the mean instead of the sum.
SMALL_CLASSIFIER = {
    **SMALL_MODEL,
    "hidden_size": 256,
    "num_hidden_layers": 0,
    "position_bias": 1.0,
    "pooling": "mean",
    "hidden_dropout": 0.1,
    "classifier_dropout": 0.1,
}


@dataclass
class ClassificationArguments(DataArguments):
    test_file: str | None = field(default=None, metadata={"help": "A file to evaluate on at the end."})
    label_column_name: str = field(default="label", metadata={"help": "Column with the classes."})
    max_length: int = field(default=512, metadata={"help": "Tokens of a document; the rest is cut off."})

    def __post_init__(self):
        super().__post_init__()
        if self.streaming:
            raise ValueError("The classes are counted before training: --streaming is for run_clm.py.")


def label_names(splits: DatasetDict) -> list[str]:
    """
    The names of the classes: those of the data set, or every value of the label column, in order.

    Raises:
        `ValueError`: a row without a label, or fewer than two classes.
    """
    feature = splits["train"].features["label"]
    if hasattr(feature, "names"):
        return feature.names
    values = set()
    for name, split in splits.items():
        missing = [row for row, label in enumerate(split["label"]) if label is None or label == ""]
        if missing:
            raise ValueError(f"Row {missing[0]} of the {name} split has no label.")
        values.update(split["label"])
    if len(values) < 2:
        raise ValueError(f"A classifier needs at least two classes, the data has {sorted(map(str, values))}.")
    numbers = all(isinstance(value, (bool, int, float)) for value in values)
    return [str(value) for value in (sorted(values) if numbers else sorted(values, key=str))]


def encode_labels(splits: DatasetDict, names: list[str]) -> DatasetDict:
    """`text` without missing values, and `label` as the index of its class."""
    is_index = hasattr(splits["train"].features["label"], "names")
    indices = {name: index for index, name in enumerate(names)}

    def encode(row: dict) -> dict:
        text = "" if row["text"] is None else str(row["text"])
        return {"text": text, "labels": row["label"] if is_index else indices[str(row["label"])]}

    return DatasetDict({key: split.map(encode, remove_columns=["label"]) for key, split in splits.items()})


def tokenize(splits: DatasetDict, tokenizer: PreTrainedTokenizerBase, max_length: int) -> DatasetDict:
    """`input_ids` and `labels`. A document ends with the end-of-text token, so that an empty one has a token too."""

    def encode(batch: dict[str, list]) -> dict[str, list]:
        documents = tokenizer(batch["text"], add_special_tokens=False)["input_ids"]
        # The tokenizer's own truncation would be saved with it.
        return {"input_ids": [[*document[: max_length - 1], tokenizer.eos_token_id] for document in documents]}

    return splits.map(encode, batched=True, remove_columns=["text"])


def baseline_accuracies(splits: DatasetDict, held_out: Iterable[str]) -> dict[str, dict[str, float]]:
    """Accuracy on each held-out split of the most frequent class, and of logistic regression on TF-IDF."""
    tfidf = TfidfVectorizer(token_pattern=r"\b\w+\b")
    baselines = {
        "most frequent class": DummyClassifier(strategy="most_frequent"),
        "TF-IDF and logistic regression": make_pipeline(tfidf, LogisticRegression(max_iter=1000)),
    }
    accuracies = {}
    for name, classifier in baselines.items():
        classifier.fit(splits["train"]["text"], splits["train"]["labels"])
        accuracies[name] = {key: classifier.score(splits[key]["text"], splits[key]["labels"]) for key in held_out}
    return accuracies


def main() -> None:
    model_arguments, data_arguments, training_arguments = parse_arguments(
        (ModelArguments, ClassificationArguments, TrainingArguments),
        output_dir="runs/text-classification",
        num_train_epochs=15,
        per_device_train_batch_size=16,
        per_device_eval_batch_size=32,
        learning_rate=5e-3,
        lr_scheduler_type="cosine",
        warmup_steps=0.1,
        weight_decay=0.1,
        train_sampling_strategy="group_by_length",
        eval_strategy="epoch",
        logging_strategy="epoch",
        save_strategy="no",
    )
    set_seed(training_arguments.seed)

    columns = {"text": data_arguments.text_column_name, "label": data_arguments.label_column_name}
    splits = load_splits(data_arguments, standard_library_packages, columns, training_arguments.seed)
    names = label_names(splits)
    splits = encode_labels(splits, names)
    tokenizer = load_tokenizer(model_arguments, splits["train"]["text"])
    config = load_config(
        model_arguments,
        tokenizer,
        SMALL_CLASSIFIER,
        id2label=dict(enumerate(names)),
        label2id={name: index for index, name in enumerate(names)},
    )
    model = load_model(AutoModelForSequenceClassification, model_arguments, config)
    print(
        f"{type(model).__name__}, {model.num_parameters():,} parameters; {splits.num_rows} documents, classes {names}"
    )
    sequences = tokenize(splits, tokenizer, min(data_arguments.max_length, config.max_position_embeddings))

    trainer = WeightDecayTrainer(
        model=model,
        args=training_arguments,
        train_dataset=sequences["train"],
        eval_dataset=sequences["validation"],
        processing_class=tokenizer,
        data_collator=DataCollatorWithPadding(tokenizer),
        compute_metrics=accuracy_metrics(),
    )
    training = trainer.train(resume_from_checkpoint=training_arguments.resume_from_checkpoint)
    trainer.save_model()
    trainer.save_state()
    trainer.log_metrics("train", training.metrics)
    trainer.save_metrics("train", training.metrics)
    accuracies = {}
    for split, prefix in (("validation", "eval"), ("test", "test")):
        if split in sequences:
            metrics = trainer.evaluate(sequences[split], metric_key_prefix=prefix)
            trainer.log_metrics(prefix, metrics)
            trainer.save_metrics(prefix, metrics)
            accuracies[split] = metrics[f"{prefix}_accuracy"]
    if not trainer.is_world_process_zero():
        return

    baselines = baseline_accuracies(splits, accuracies)
    plot_path = Path(training_arguments.output_dir) / "training.png"
    references = {name: values["validation"] for name, values in baselines.items()}
    plot_training(trainer.state.log_history, "accuracy", references, plot_path)
    reported = "test" if "test" in accuracies else "validation"
    save_model_card(
        trainer,
        data_arguments.source,
        {"accuracy": accuracies[reported]},
        {name: {"accuracy": values[reported]} for name, values in baselines.items()},
    )
    first = sequences["validation"][0]["input_ids"]
    check_reload(AutoModelForSequenceClassification, trainer, {"input_ids": torch.tensor([first])})

    print("\nAccuracy" + "".join(f"{split:>14}" for split in accuracies))
    for name, values in {type(model).__name__: accuracies, **baselines}.items():
        print("        " + "".join(f"{values[split]:14.2%}" for split in accuracies) + f"  {name}")
    better = [name for name, values in baselines.items() if values[reported] >= accuracies[reported]]
    if better:
        print(f"The model is no better than: {', '.join(better)}.")
    print(f"Saved and reloaded from {training_arguments.output_dir}; loss and accuracy by step: {plot_path}")


if __name__ == "__main__":
    main()
