"""Train a model that predicts a number from text and numbers with `Trainer`, save it, reload it, and compare it with the
published baseline and with a ridge regression on the numbers alone.

Without arguments: how long a function of Python's standard library is, from its name, its docstring and numbers that its
signature shows. It needs no network.

    python examples/run_multimodal_regression.py
    python examples/run_multimodal_regression.py --train_file houses.csv --text_column_name description \
        --numeric_column_names rooms area year --label_column_name price --output_dir runs/houses

An empty cell in a numeric column, and an empty text, are "not given".
"""

import copy
import math
import time
from dataclasses import dataclass, field
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from datasets import Dataset, DatasetDict
from embedded_data import SIGNATURE_COLUMNS, standard_library_functions
from sklearn.linear_model import RidgeCV
from sklearn.metrics import r2_score
from torch import nn
from torch.nn import functional as F
from training_utils import (
    LabelledDataArguments,
    Task,
    TextDataArguments,
    TextModelArguments,
    build_trainer,
    check_reload,
    load_config,
    load_metric,
    load_model,
    load_splits,
    load_tokenizer,
    parse_arguments,
    plot_training,
    save_model_card,
    train_and_evaluate,
)
from transformers import (
    AutoModelForSequenceClassification,
    EvalPrediction,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
    TrainingArguments,
    set_seed,
)

from modeling_sumagg import DataCollatorForMultimodalRegression


# The published form at half the width, which is enough for a few thousand rows.
SMALL_MODEL = {"model_type": "sumagg_multimodal", "hidden_size": 128, "max_position_embeddings": 128}


@dataclass
class RegressionArguments(LabelledDataArguments, TextDataArguments):
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


def to_numbers(splits: DatasetDict, columns: list[str]) -> DatasetDict:
    """`text`, empty where it is missing, `numeric_features` and `labels`."""

    def convert(row: dict, index: int) -> dict:
        labels = to_number(row["label"])
        if math.isnan(labels):
            raise ValueError(f"Row {index} has no label: {row}.")
        text = "" if row["text"] is None else str(row["text"])
        return {"text": text, "numeric_features": [to_number(row[column]) for column in columns], "labels": labels}

    return splits.map(convert, with_indices=True, remove_columns=[*columns, "label"])


def statistics(splits: DatasetDict) -> dict[str, list[float]]:
    """Means and standard deviations of the training data, for the config; 1 for the deviation of a constant."""
    values = {}
    for name, column in (("numeric", "numeric_features"), ("label", "labels")):
        rows = np.array(splits["train"][column], dtype=float).reshape(len(splits["train"]), -1)
        mean, std = np.nanmean(rows, axis=0), np.nanstd(rows, axis=0)
        values |= {f"{name}_mean": mean.tolist(), f"{name}_std": np.where(std > 0, std, 1).tolist()}
    return values


def tokenize(splits: DatasetDict, tokenizer: PreTrainedTokenizerBase, max_length: int) -> DatasetDict:
    """`input_ids` of at most `max_length` tokens; none at all, special ones neither, for an empty text."""

    def encode(row: dict) -> dict:
        if not row["text"]:
            return {"input_ids": []}
        return {"input_ids": tokenizer(row["text"], truncation=True, max_length=max_length)["input_ids"]}

    return splits.map(encode, remove_columns=["text"])


class ConcatenationBaseline(nn.Module):
    """
    The published baseline: one softmax attention layer over the text and the mean of its outputs, the standardised
    numbers concatenated, and the same layers from there to the output. A number that is not given is the mean.
    """

    def __init__(self, config: PreTrainedConfig):
        super().__init__()
        self.config = config
        self.tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.positions = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.attention = nn.MultiheadAttention(config.hidden_size, num_heads=8, batch_first=True)
        sizes = [config.hidden_size + config.num_numeric_features, *config.head_hidden_sizes]
        layers = [layer for a, b in zip(sizes[:-1], sizes[1:], strict=True) for layer in (nn.Linear(a, b), nn.ReLU())]
        self.head = nn.Sequential(*layers, nn.Dropout(config.classifier_dropout), nn.Linear(sizes[-1], 1))
        for embedding in (self.tokens, self.positions):
            nn.init.normal_(embedding.weight, std=config.initializer_range)

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        numeric_features: torch.Tensor,
        labels: torch.Tensor,
    ) -> dict[str, torch.Tensor]:
        hidden_states = self.tokens(input_ids) + self.positions.weight[: input_ids.shape[1]]
        # The softmax needs one token, also where there is none; the mean leaves it out.
        hidden_tokens = attention_mask == 0
        hidden_tokens[:, :1] = False
        attended, _ = self.attention(
            hidden_states, hidden_states, hidden_states, key_padding_mask=hidden_tokens, need_weights=False
        )
        count = attention_mask.sum(dim=1, keepdim=True).clamp(min=1)
        text = (attended * attention_mask[..., None]).sum(dim=1) / count
        mean, std = (labels.new_tensor(values) for values in (self.config.numeric_mean, self.config.numeric_std))
        numbers = ((numeric_features - mean) / std).nan_to_num(nan=0.0)
        scores = self.head(torch.cat((text, numbers), dim=1))[:, 0]
        mean, std = self.config.label_mean[0], self.config.label_std[0]
        return {"loss": F.mse_loss(scores, (labels - mean) / std), "logits": scores * std + mean}


def ridge_predictions(train: Dataset, held_out: Dataset, config: PreTrainedConfig) -> np.ndarray:
    """What a ridge regression on the standardised numbers predicts; a number that is not given is the mean."""

    def numbers(rows: Dataset) -> np.ndarray:
        values = np.array(rows["numeric_features"], dtype=float)
        return np.nan_to_num((values - config.numeric_mean) / config.numeric_std, nan=0.0)

    ridge = RidgeCV(alphas=np.logspace(-3, 3, 13)).fit(numbers(train), train["labels"])
    return ridge.predict(numbers(held_out))


def plot_predictions(predictions: dict[str, np.ndarray], labels: np.ndarray, path: Path) -> None:
    """Predictions over labels, a panel for each model, with the line on which they agree."""
    figure, panels = plt.subplots(
        1, len(predictions), figsize=(4 * len(predictions), 4), sharex=True, sharey=True, layout="constrained"
    )
    for axes, (name, values) in zip(panels, predictions.items(), strict=True):
        axes.scatter(labels, values, s=8, alpha=0.3, edgecolors="none")
        axes.axline((labels.mean(), labels.mean()), slope=1, color="black", linewidth=1)
        axes.set(title=name, xlabel="label")
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("prediction")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def prepare(
    model_arguments: TextModelArguments, data_arguments: RegressionArguments, training_arguments: TrainingArguments
) -> Task:
    columns = data_arguments.numeric_column_names
    splits = load_splits(
        data_arguments,
        standard_library_functions,
        {
            "text": data_arguments.text_column_name,
            "label": data_arguments.label_column_name,
            **{column: column for column in columns},
        },
        training_arguments.seed,
    )
    splits = to_numbers(splits, columns)
    tokenizer = load_tokenizer(model_arguments, splits["train"]["text"])
    config = load_config(
        model_arguments, SMALL_MODEL, tokenizer, num_numeric_features=len(columns), **statistics(splits)
    )
    model = load_model(AutoModelForSequenceClassification, model_arguments, config)
    splits = tokenize(splits, tokenizer, config.max_position_embeddings)
    print(f"{type(model).__name__}; {splits.num_rows} rows; numbers: {', '.join(columns)}")
    metric = load_metric("regression")
    held_out = {split: splits[split] for split in ("validation", "test") if split in splits}

    def compute_metrics(outputs: EvalPrediction) -> dict[str, float]:
        return metric.compute(predictions=outputs.predictions.reshape(-1), references=outputs.label_ids)

    def baselines() -> dict[str, dict[str, float]]:
        return {
            "ridge on the numbers": {
                split: r2_score(rows["labels"], ridge_predictions(splits["train"], rows, config))
                for split, rows in held_out.items()
            }
        }

    return Task(
        auto_class=AutoModelForSequenceClassification,
        model=model,
        processing_class=tokenizer,
        train_dataset=splits["train"],
        held_out=held_out,
        trainer_arguments={
            "data_collator": DataCollatorForMultimodalRegression(tokenizer),
            "compute_metrics": compute_metrics,
        },
        source=data_arguments.source,
        metric="r2",
        baselines=baselines,
    )


def main() -> None:
    arguments = parse_arguments(
        (TextModelArguments, RegressionArguments, TrainingArguments),
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
    )
    training_arguments = arguments[-1]
    set_seed(training_arguments.seed)
    task = prepare(*arguments)
    trainer = build_trainer(task, training_arguments)
    train_and_evaluate(trainer, task)
    *_, (split, held_out) = task.held_out.items()
    outputs = trainer.predict(held_out)

    # The same data, steps and random numbers; only the first model is kept.
    baseline_arguments = copy.copy(training_arguments)
    baseline_arguments.save_strategy = "no"
    config = task.model.config
    set_seed(training_arguments.seed)
    baseline_trainer = build_trainer(task, baseline_arguments, ConcatenationBaseline(config))
    baseline_trainer.train()
    baseline_outputs = baseline_trainer.predict(held_out)
    if not trainer.is_world_process_zero():
        return

    start = time.perf_counter()
    ridge_outputs = ridge_predictions(task.train_dataset, held_out, config)
    ridge_seconds = time.perf_counter() - start
    name = type(task.model).__name__
    predictions = {
        name: outputs.predictions.reshape(-1),
        "attention and concatenation": baseline_outputs.predictions.reshape(-1),
        "ridge on the numbers": ridge_outputs,
    }
    sizes = [
        (
            sum(parameter.numel() for parameter in each.model.parameters()),
            next(entry["train_runtime"] for entry in each.state.log_history if "train_runtime" in entry),
        )
        for each in (trainer, baseline_trainer)
    ]
    sizes.append((config.num_numeric_features + 1, ridge_seconds))
    labels = outputs.label_ids
    compute_metrics = task.trainer_arguments["compute_metrics"]
    results = {key: compute_metrics(EvalPrediction(values, labels)) for key, values in predictions.items()}

    folder = Path(training_arguments.output_dir)
    references = {f"{split}, {key}": values["r2"] for key, values in results.items()}
    plot_training(trainer.state.log_history, "r2", references, folder / "training.png")
    plot_predictions(predictions, labels, folder / "predictions.png")
    baselines = {key: values for key, values in results.items() if key != name}
    reloaded = check_reload(task.auto_class, trainer, trainer.data_collator([held_out[0]]))
    save_model_card(trainer, reloaded, folder, task.source, results[name], baselines)

    print(f"\nOn the {split} rows ({len(labels)}), in the units of the labels:")
    print(f"  {'R²':>7}  {'RMSE':>9}  {'parameters':>10}  {'training':>9}")
    for (key, values), (parameters, seconds) in zip(results.items(), sizes, strict=True):
        print(f"  {values['r2']:7.4f}  {values['rmse']:9.4g}  {parameters:10,}  {seconds:7.2f} s  {key}")
    for key, values in baselines.items():
        if results[name]["r2"] <= values["r2"]:
            print(f"{name} is not better than {key}.")
    print(f"Saved and reloaded from {folder}; plots: {folder / 'training.png'}, {folder / 'predictions.png'}")


if __name__ == "__main__":
    main()
