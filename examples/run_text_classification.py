"""Train a classifier of long documents with `Trainer`, from scratch or from a causal language model, and compare it
with simple baselines.

Without arguments: which package of Python's standard library a piece of code is from, which needs no network.

    python examples/run_text_classification.py
    python examples/run_text_classification.py --train_file a.csv --validation_file b.csv
    python examples/run_text_classification.py --model_name_or_path runs/clm --output_dir runs/from-pretrained
"""

from collections.abc import Iterable
from dataclasses import dataclass, field

from datasets import DatasetDict
from embedded_data import standard_library_packages
from sklearn.dummy import DummyClassifier
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from training_utils import (
    SMALL_MODEL,
    LabelledDataArguments,
    Task,
    TextDataArguments,
    TextModelArguments,
    accuracy_metrics,
    build_trainer,
    label_indices,
    label_maps,
    label_names,
    load_config,
    load_model,
    load_splits,
    load_tokenizer,
    parse_arguments,
    report,
    train_and_evaluate,
)
from transformers import (
    AutoModelForSequenceClassification,
    DataCollatorWithPadding,
    PreTrainedTokenizerBase,
    TrainingArguments,
    set_seed,
)


# The published classifier, no blocks at all, but for the mean instead of the sum, and dropout.
SMALL_CLASSIFIER = {
    **SMALL_MODEL,
    "hidden_size": 256,
    "num_hidden_layers": 0,
    "position_bias": 1.0,
    "hidden_dropout": 0.1,
    "classifier_dropout": 0.1,
}


@dataclass
class ClassificationArguments(LabelledDataArguments, TextDataArguments):
    max_length: int = field(default=1024, metadata={"help": "Tokens of a document; the rest is cut off."})


def encode_labels(splits: DatasetDict, names: list[str]) -> DatasetDict:
    """`text` without missing values, and `label` as the index of its class."""
    indices = label_indices(splits, names)

    def encode(row: dict) -> dict:
        text = "" if row["text"] is None else str(row["text"])
        return {"text": text, "labels": indices[row["label"]]}

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


def prepare(
    model_arguments: TextModelArguments, data_arguments: ClassificationArguments, training_arguments: TrainingArguments
) -> Task:
    columns = {"text": data_arguments.text_column_name, "label": data_arguments.label_column_name}
    splits = load_splits(data_arguments, standard_library_packages, columns, training_arguments.seed)
    names = label_names(splits)
    splits = encode_labels(splits, names)
    tokenizer = load_tokenizer(model_arguments, splits["train"]["text"])
    config = load_config(model_arguments, SMALL_CLASSIFIER, tokenizer, **label_maps(names))
    model = load_model(AutoModelForSequenceClassification, model_arguments, config)
    print(
        f"{type(model).__name__}, {model.num_parameters():,} parameters; {splits.num_rows} documents, classes {names}"
    )
    sequences = tokenize(splits, tokenizer, min(data_arguments.max_length, config.max_position_embeddings))
    held_out = {split: sequences[split] for split in ("validation", "test") if split in sequences}
    return Task(
        auto_class=AutoModelForSequenceClassification,
        model=model,
        processing_class=tokenizer,
        train_dataset=sequences["train"],
        held_out=held_out,
        trainer_arguments={
            "data_collator": DataCollatorWithPadding(tokenizer),
            "compute_metrics": accuracy_metrics(),
        },
        source=data_arguments.source,
        metric="accuracy",
        baselines=lambda: baseline_accuracies(splits, held_out),
    )


def main() -> None:
    arguments = parse_arguments(
        (TextModelArguments, ClassificationArguments, TrainingArguments),
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
    training_arguments = arguments[-1]
    set_seed(training_arguments.seed)
    task = prepare(*arguments)
    trainer = build_trainer(task, training_arguments)
    accuracies = train_and_evaluate(trainer, task)
    if trainer.is_world_process_zero():
        report(trainer, task, accuracies)


if __name__ == "__main__":
    main()
