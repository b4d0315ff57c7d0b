"""Train a model that predicts a number from text and numbers with `Trainer`, and compare it with the published baseline
and with a ridge regression on the numbers alone.

Without arguments: how long a function of Python's standard library is, from its name, its docstring and numbers that its
signature shows. It needs no network.

    python run_multimodal_regression.py
    python run_multimodal_regression.py --train_file houses.csv --text_column_name description \
        --numeric_column_names rooms area year --label_column_name price --output_dir runs/houses
    python run_multimodal_regression.py --train_file flats.csv --numeric_column_names rooms --label_column_name price \
        --model_name_or_path runs/houses --lora_rank 8 --output_dir runs/flats

An empty cell in a numeric column, and an empty text, are "not given". Numbers and labels of any size keep their digits.
"""

import copy
import os
from dataclasses import dataclass, field
from pathlib import Path


# Threads that wait for each other sleep, and leave the processor to others: read when torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import numpy as np
import torch
from datasets import DatasetDict
from sklearn.linear_model import RidgeCV
from sklearn.metrics import r2_score, root_mean_squared_error
from torch import nn
from transformers import (
    AutoModelForSequenceClassification,
    EvalPrediction,
    PreTrainedConfig,
    Trainer,
    TrainingArguments,
    set_seed,
)

from modeling_sumagg import DataCollatorForMultimodalRegression
from modeling_sumagg.training import feature_statistics
from modeling_sumagg.training.baselines import ConcatenationRegression
from modeling_sumagg.training.embedded_data import SIGNATURE_COLUMNS, standard_library_functions
from modeling_sumagg.training.plots import plot_predictions
from modeling_sumagg.training.runs import MODEL, report, train_and_evaluate
from modeling_sumagg.training.scripts import (
    DecayTrainer,
    LabelledDataArguments,
    TextModelArguments,
    add_adapters,
    load_config,
    load_model,
    load_splits,
    load_tokenizer,
    model_max_length,
    parse_arguments,
    run,
    source_of,
    user_errors,
)


# The published form at half the width, which is enough for a few thousand rows.
SMALL_MODEL = {"model_type": "sumagg_multimodal", "hidden_size": 128, "max_position_embeddings": 128}


@dataclass
class RowArguments(LabelledDataArguments):
    text_column_name: str = field(default="text", metadata={"help": "Column with the texts."})
    numeric_column_names: list[str] = field(
        default_factory=list, metadata={"help": "Columns with the numbers to predict from."}
    )

    def __post_init__(self):
        super().__post_init__()
        if self.dataset_name is None and self.train_file is None:
            self.numeric_column_names = SIGNATURE_COLUMNS
        if not self.numeric_column_names:
            raise ValueError("Name the columns with the numbers to predict from: --numeric_column_names.")


def ridge_predictions(splits: DatasetDict, config: PreTrainedConfig) -> dict[str, np.ndarray]:
    """The predictions of a ridge regression on the standardised numbers; a number that is not given is the mean."""
    x = {}
    for name, rows in splits.items():
        numbers = np.array(rows["numeric_features"], dtype=float)
        x[name] = np.nan_to_num((numbers - config.numeric_mean) / config.numeric_std, nan=0.0)
    ridge = RidgeCV(alphas=np.logspace(-3, 3, 13)).fit(x["train"], splits["train"]["labels"])
    return {name: ridge.predict(rows) for name, rows in x.items() if name != "train"}


def scores(outputs: EvalPrediction) -> dict[str, float]:
    predictions = outputs.predictions.reshape(-1)
    return {
        "r2": r2_score(outputs.label_ids, predictions),
        "rmse": root_mean_squared_error(outputs.label_ids, predictions),
    }


def main() -> None:
    with user_errors():
        data_arguments, model_arguments, training_arguments = parse_arguments(
            (RowArguments, TextModelArguments),
            __doc__,
            output_dir="runs/multimodal-regression",
            num_train_epochs=1,
            learning_rate=1e-3,
            weight_decay=0.01,
            per_device_train_batch_size=32,
            per_device_eval_batch_size=256,
            eval_strategy="steps",
            eval_steps=0.2,
            logging_steps=0.05,
            remove_unused_columns=False,
        )
        is_own = data_arguments.dataset_name or data_arguments.train_file
        source = source_of(data_arguments, "Python's standard library")
        label_name = data_arguments.label_column_name if is_own else "ln(lines of the function)"
        folder = Path(training_arguments.output_dir)
        duration = "the progress bars show how long" if is_own else "about a minute on two cores"
        print(f"Trains a regression of {label_name} on {source} and saves it to {folder} ({duration}).")
        numeric = data_arguments.numeric_column_names
        columns = {"text": data_arguments.text_column_name, "label": data_arguments.label_column_name}
        splits = load_splits(
            data_arguments,
            standard_library_functions,
            columns | {column: column for column in numeric},
            seed=training_arguments.seed,
            embedded_name=source,
            numbers=["label", *numeric],
            optional=["text", *numeric],
        )
        splits = splits.map(
            lambda row: {
                "text": row["text"] or "",
                "numeric_features": [row[column] for column in numeric],
                "labels": row["label"],
            },
            remove_columns=[*numeric, "label"],
        )
        tokenizer = load_tokenizer(model_arguments, splits["train"]["text"])
        facts = {"num_numeric_features": len(numeric), **feature_statistics(splits["train"])}
        config = load_config(model_arguments, SMALL_MODEL, tokenizer, **facts)
        model = load_model(AutoModelForSequenceClassification, model_arguments, config)

    tokenizer.model_max_length = model_max_length(config)
    # An empty text has no tokens at all, special ones neither.
    splits = splits.map(
        lambda row: {"input_ids": tokenizer(row["text"], truncation=True)["input_ids"] if row["text"] else []},
        remove_columns=["text"],
    )
    print(f"{type(model).__name__}, {model.num_parameters():,} parameters; {splits.num_rows} rows; numbers: {numeric}")
    if model_arguments.lora_rank:
        model = add_adapters(model, model_arguments, modules_to_save=["numeric_branch", "score"])
    exact = torch.float32 if training_arguments.device.type == "mps" else torch.float64

    def make_trainer(model: nn.Module, arguments: TrainingArguments) -> Trainer:
        return DecayTrainer(
            model=model,
            args=arguments,
            train_dataset=splits["train"],
            eval_dataset=splits["validation"],
            processing_class=tokenizer,
            data_collator=DataCollatorForMultimodalRegression(tokenizer, dtype=exact),
            compute_metrics=scores,
        )

    trainer = make_trainer(model, training_arguments)
    held_out = {name: split for name, split in splits.items() if name != "train"}
    results = train_and_evaluate(trainer, held_out, ["r2", "rmse"])

    # The same data, steps and random numbers; only the first model is kept.
    baseline_arguments = copy.copy(training_arguments)
    baseline_arguments.save_strategy = "no"
    set_seed(training_arguments.seed)
    print("\nThe baseline of the paper, attention and concatenation, trains on the same:")
    baseline_trainer = make_trainer(ConcatenationRegression(config), baseline_arguments)
    baseline_trainer.train()
    last = [*held_out][-1]
    predictions = {}
    for name, each in ((MODEL, trainer), ("attention and concatenation", baseline_trainer)):
        by_split = {split: each.predict(rows).predictions.reshape(-1) for split, rows in held_out.items()}
        predictions[name] = by_split
    if not trainer.is_world_process_zero():
        return

    predictions["ridge on the numbers"] = ridge_predictions(splits, config)
    labels = {split: np.array(rows["labels"]) for split, rows in held_out.items()}
    for name, by_split in predictions.items():
        if name != MODEL:
            results[name] = {s: scores(EvalPrediction(by_split[s], labels[s])) for s in held_out}
    plot_predictions(
        {name: by_split[last] for name, by_split in predictions.items()},
        labels[last],
        label_name,
        folder / "predictions.png",
    )
    report(
        trainer,
        AutoModelForSequenceClassification,
        results,
        held_out,
        base_model=model_arguments.model_name_or_path,
        loss_unit="squared standard deviations",
        pictures=f", predictions.png the {last} split",
        units={"rmse": label_name},
        numeric_features=numeric,
    )


if __name__ == "__main__":
    run(main)
