"""Train a model that predicts a number from text and numbers with `Trainer`, and compare it with the published baseline
and with a ridge regression on the numbers alone.

Without arguments: how long a function of Python's standard library is, from its name, its docstring and numbers that its
signature shows. It needs no network.

    python run_multimodal_regression.py
    python run_multimodal_regression.py --train_file houses.csv --text_column_name description \
        --numeric_column_names rooms area year --label_column_name price --output_dir runs/houses
    python run_multimodal_regression.py --train_file flats.csv --numeric_column_names rooms --label_column_name price \
        --model_name_or_path runs/houses --lora_rank 8 --output_dir runs/flats

An empty cell in a numeric column, and an empty text, are "not given".
"""

import copy
import math
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
    HfArgumentParser,
    PreTrainedConfig,
    Trainer,
    TrainingArguments,
    set_seed,
)

from modeling_sumagg import DataCollatorForMultimodalRegression
from modeling_sumagg.training import feature_statistics
from modeling_sumagg.training.baselines import ConcatenationRegression
from modeling_sumagg.training.embedded_data import SIGNATURE_COLUMNS, standard_library_functions
from modeling_sumagg.training.plots import plot_predictions, plot_training
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
    save_checked,
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


def to_number(value: str | float | None) -> float:
    """A cell as a number; NaN if it is empty."""
    return float("nan") if value is None or value == "" else float(value)


def to_numbers(row: dict, index: int, columns: list[str]) -> dict:
    """`text`, empty where it is missing, `numeric_features` and `labels`."""
    label = to_number(row["label"])
    if math.isnan(label):
        raise ValueError(f"Row {index} has no label: {row}.")
    text = "" if row["text"] is None else str(row["text"])
    return {"text": text, "numeric_features": [to_number(row[column]) for column in columns], "labels": label}


def ridge_predictions(splits: DatasetDict, config: PreTrainedConfig) -> dict[str, np.ndarray]:
    """What a ridge regression on the standardised numbers predicts; a number that is not given is the mean."""
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
    parser = HfArgumentParser(
        (TextModelArguments, RowArguments, TrainingArguments),
        description=__doc__.partition("\n\n")[0],
        usage="%(prog)s [options]",
        allow_abbrev=False,
    )
    parser.set_defaults(
        output_dir="runs/multimodal-regression",
        num_train_epochs=1,
        learning_rate=1e-3,
        lr_scheduler_type="cosine",
        warmup_steps=0.1,
        weight_decay=0.01,
        per_device_train_batch_size=32,
        per_device_eval_batch_size=256,
        eval_strategy="steps",
        eval_steps=0.2,
        logging_steps=0.05,
        save_strategy="no",
        report_to="none",
        dataloader_pin_memory=torch.accelerator.is_available(),
        # PEFT hides the names of the inputs and of the labels.
        label_names=["labels"],
        remove_unused_columns=False,
    )
    with user_errors():
        model_arguments, data_arguments, training_arguments = parser.parse_args_into_dataclasses()
        source = data_arguments.dataset_name or data_arguments.train_file
        label_name = data_arguments.label_column_name if source else "ln(lines of the function)"
        folder = Path(training_arguments.output_dir)
        duration = "the progress bars show how long" if source else "about a minute on two cores"
        source = source or "Python's standard library"
        print(f"Trains a regression of {label_name} on {source} and saves it to {folder} ({duration}).")
        set_seed(training_arguments.seed)
        numeric = data_arguments.numeric_column_names
        columns = {"text": data_arguments.text_column_name, "label": data_arguments.label_column_name}
        columns |= {column: column for column in numeric}
        splits = load_splits(data_arguments, standard_library_functions, columns, seed=training_arguments.seed)
        splits = splits.map(
            to_numbers, with_indices=True, fn_kwargs={"columns": numeric}, remove_columns=[*numeric, "label"]
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

    def make_trainer(model: nn.Module, arguments: TrainingArguments) -> Trainer:
        return DecayTrainer(
            model=model,
            args=arguments,
            train_dataset=splits["train"],
            eval_dataset=splits["validation"],
            processing_class=tokenizer,
            data_collator=DataCollatorForMultimodalRegression(tokenizer),
            compute_metrics=scores,
        )

    def predictions_of(trainer: Trainer) -> dict[str, np.ndarray]:
        return {split: trainer.predict(splits[split]).predictions.reshape(-1) for split in held_out}

    held_out = [split for split in ("validation", "test") if split in splits]
    trainer = make_trainer(model, training_arguments)
    predictions = {}
    if model_arguments.lora_rank:
        trainer.evaluate()
        predictions["before training"] = predictions_of(trainer)
    resume = training_arguments.resume_from_checkpoint
    metrics = {"train": trainer.train(resume_from_checkpoint=True if resume == "last" else resume).metrics}
    trainer.save_model()
    trainer.save_state()
    for split in held_out:
        prefix = "eval" if split == "validation" else split
        metrics[prefix] = trainer.evaluate(splits[split], metric_key_prefix=prefix)
    for prefix, values in metrics.items():
        trainer.save_metrics(prefix, values)
    name = type(model).__name__
    predictions = {name: predictions_of(trainer), **predictions}

    # The same data, steps and random numbers; only the first model is kept.
    baseline_arguments = copy.copy(training_arguments)
    baseline_arguments.save_strategy = "no"
    set_seed(training_arguments.seed)
    print("\nThe baseline of the paper, attention and concatenation, trains on the same:")
    baseline_trainer = make_trainer(ConcatenationRegression(config), baseline_arguments)
    baseline_trainer.train()
    predictions["attention and concatenation"] = predictions_of(baseline_trainer)
    if not trainer.is_world_process_zero():
        return

    predictions["ridge on the numbers"] = ridge_predictions(splits, config)
    labels = {split: np.array(splits[split]["labels"]) for split in held_out}
    results = {
        key: {split: scores(EvalPrediction(values[split], labels[split])) for split in held_out}
        for key, values in predictions.items()
    }
    last = held_out[-1]
    baselines = {key: by_split for key, by_split in results.items() if key != name}
    plot_training(
        trainer.state.log_history,
        folder / "training.png",
        metric="r2",
        baselines={key: by_split["validation"]["r2"] for key, by_split in baselines.items()},
        model_name=name,
        loss_unit="squared standard deviations",
    )
    plot_predictions(
        {key: values[last] for key, values in predictions.items()},
        labels[last],
        label_name,
        folder / "predictions.png",
    )
    save_checked(
        trainer,
        AutoModelForSequenceClassification,
        dataset_name=f"{source}, {last} split",
        metrics=results[name][last],
        baselines={key: by_split[last] for key, by_split in baselines.items()},
        units={"rmse": label_name},
    )

    print(f"\nOn the {last} split ({len(labels[last])} rows), RMSE in the unit of {label_name}:")
    print(f"  {'R²':>7}  {'RMSE':>9}")
    for key, by_split in results.items():
        print(f"  {by_split[last]['r2']:7.4f}  {by_split[last]['rmse']:9.4g}  {key}")
    better = [key for key, by_split in baselines.items() if by_split[last]["r2"] >= results[name][last]["r2"]]
    if better:
        print(f"{name} is no better than: {', '.join(better)}.")
    print(f"Saved to {folder}; training.png shows loss and R² by step, predictions.png the {last} split.")


if __name__ == "__main__":
    main()
