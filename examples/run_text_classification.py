"""Train a classifier of long documents with `Trainer`, from scratch or from a causal language model, and compare it
with simple baselines.

Without arguments: which package of Python's standard library a piece of code is from, which needs no network. The model
has no limit of length.

    python run_text_classification.py
    python run_text_classification.py --train_file a.csv --validation_file b.csv
    python run_text_classification.py --model_name_or_path runs/clm --output_dir runs/from-pretrained
    python run_text_classification.py --model_name_or_path runs/clm --lora_rank 8 --learning_rate 1e-2 \
        --num_train_epochs 4 --output_dir runs/adapted
"""

import copy
import os
from dataclasses import dataclass, field
from pathlib import Path


# Threads that wait for each other sleep, and leave the processor to others: read when torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch
from datasets import DatasetDict
from peft import TaskType
from sklearn.dummy import DummyClassifier
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score
from sklearn.pipeline import make_pipeline
from transformers import (
    AutoModelForSequenceClassification,
    DataCollatorWithPadding,
    EvalPrediction,
    HfArgumentParser,
    PreTrainedTokenizerBase,
    TrainingArguments,
    set_seed,
)

from modeling_sumagg.families import FAMILIES
from modeling_sumagg.training.embedded_data import standard_library_packages
from modeling_sumagg.training.plots import plot_training
from modeling_sumagg.training.scripts import (
    DecayTrainer,
    LabelledDataArguments,
    TextModelArguments,
    add_adapters,
    encode_labels,
    load_config,
    load_model,
    load_splits,
    load_tokenizer,
    model_max_length,
    save_checked,
    user_errors,
)


# The published classifier, no blocks at all, but for the mean instead of the sum, dropout, and positions without end.
SMALL_CLASSIFIER = {
    "model_type": "sumagg",
    "hidden_size": 256,
    "num_hidden_layers": 0,
    "num_attention_heads": 4,
    "position_embedding_type": "sinusoidal",
    "position_bias": 1.0,
    "pooling": "mean",
    "hidden_dropout": 0.1,
    "classifier_dropout": 0.1,
}


@dataclass
class DocumentArguments(LabelledDataArguments):
    text_column_name: str = field(default="text", metadata={"help": "Column with the texts."})
    max_length: int = field(default=1024, metadata={"help": "Tokens of a document to train on; the rest is cut off."})


def to_tokens(texts: list, tokenizer: PreTrainedTokenizerBase, max_length: int) -> dict[str, list[list[int]]]:
    """`input_ids`. A document ends with the end-of-text token, so that an empty one has a token too."""
    documents = tokenizer([as_text(text) for text in texts], add_special_tokens=False)["input_ids"]
    # The tokenizer's own truncation would be saved with it.
    return {"input_ids": [[*document[: max_length - 1], tokenizer.eos_token_id] for document in documents]}


def as_text(value: str | float | None) -> str:
    return "" if value is None else str(value)


def accuracy(outputs: EvalPrediction) -> dict[str, float]:
    return {"accuracy": accuracy_score(outputs.label_ids, outputs.predictions.argmax(axis=1))}


def baseline_accuracies(splits: DatasetDict) -> dict[str, dict[str, float]]:
    """Accuracy on each held-out split of the most frequent class, and of logistic regression on TF-IDF."""
    tfidf = TfidfVectorizer(token_pattern=r"\b\w+\b")
    classifiers = {
        "most frequent class": DummyClassifier(strategy="most_frequent"),
        "TF-IDF and logistic regression": make_pipeline(tfidf, LogisticRegression(max_iter=1000)),
    }
    x = {name: [as_text(text) for text in split["text"]] for name, split in splits.items()}
    y = {name: split["labels"][:] for name, split in splits.items()}
    accuracies = {}
    for name, classifier in classifiers.items():
        classifier.fit(x["train"], y["train"])
        accuracies[name] = {split: classifier.score(x[split], y[split]) for split in splits if split != "train"}
    return accuracies


def main() -> None:
    parser = HfArgumentParser(
        (TextModelArguments, DocumentArguments, TrainingArguments),
        description=__doc__.partition("\n\n")[0],
        usage="%(prog)s [options]",
        allow_abbrev=False,
    )
    parser.set_defaults(
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
        report_to="none",
        dataloader_pin_memory=torch.accelerator.is_available(),
        # PEFT hides the names of the labels.
        label_names=["labels"],
    )
    with user_errors():
        model_arguments, data_arguments, training_arguments = parser.parse_args_into_dataclasses()
        source = data_arguments.dataset_name or data_arguments.train_file
        folder = Path(training_arguments.output_dir)
        duration = "the progress bar shows how long" if source else "about 2 minutes on two cores"
        source = source or "Python's standard library"
        print(f"Trains a classifier of documents on {source} and saves it to {folder} ({duration}).")
        set_seed(training_arguments.seed)
        columns = {"text": data_arguments.text_column_name, "label": data_arguments.label_column_name}
        splits = load_splits(data_arguments, standard_library_packages, columns, seed=training_arguments.seed)
        splits, names = encode_labels(splits)
        tokenizer = load_tokenizer(model_arguments, map(as_text, splits["train"]["text"]))
        labels = {"id2label": dict(enumerate(names)), "label2id": {name: index for index, name in enumerate(names)}}
        config = load_config(model_arguments, SMALL_CLASSIFIER, tokenizer, **labels)
        model = load_model(AutoModelForSequenceClassification, model_arguments, config)
        max_length = min(data_arguments.max_length, model_max_length(config))
        documents = splits.map(
            lambda batch: to_tokens(batch["text"], tokenizer, max_length), batched=True, remove_columns=["text"]
        )

    print(
        f"{type(model).__name__}, {model.num_parameters():,} parameters; {splits.num_rows} documents, classes {names}"
    )
    if model_arguments.lora_rank:
        options = {"task_type": TaskType.SEQ_CLS, "modules_to_save": ["score", "pooler"]}
        if model_arguments.target_modules is None and config.model_type in FAMILIES:
            # Which words there are tells most about a document.
            options["target_modules"] = [*FAMILIES[config.model_type].lora_target_modules, "embed_tokens"]
        model = add_adapters(model, model_arguments, **options)
    # Models with absolute positions are trained with padding on the right.
    padding = copy.deepcopy(tokenizer)
    padding.padding_side = "right"
    tokenizer.model_max_length = model_max_length(config)
    trainer = DecayTrainer(
        model=model,
        args=training_arguments,
        train_dataset=documents["train"],
        eval_dataset=documents["validation"],
        processing_class=tokenizer,
        data_collator=DataCollatorWithPadding(padding),
        compute_metrics=accuracy,
    )
    held_out = [split for split in documents if split != "train"]
    baselines = {}
    if model_arguments.lora_rank:
        trainer.evaluate()
        baselines["before training"] = {
            split: trainer.predict(documents[split]).metrics["test_accuracy"] for split in held_out
        }
    resume = training_arguments.resume_from_checkpoint
    metrics = {"train": trainer.train(resume_from_checkpoint=True if resume == "last" else resume).metrics}
    trainer.save_model()
    trainer.save_state()
    accuracies = {}
    for split in held_out:
        prefix = "eval" if split == "validation" else split
        metrics[prefix] = trainer.evaluate(documents[split], metric_key_prefix=prefix)
        accuracies[split] = metrics[prefix][f"{prefix}_accuracy"]
    for prefix, values in metrics.items():
        trainer.save_metrics(prefix, values)
    if not trainer.is_world_process_zero():
        return

    baselines |= baseline_accuracies(splits)
    save_checked(
        trainer,
        AutoModelForSequenceClassification,
        hyperparameters={"max_length": max_length},
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
