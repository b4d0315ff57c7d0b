"""
The end of a training script: training, evaluation, and the report of both: tables, a card, a picture.

It needs what the example scripts need: `pip install 'modeling-sumagg[examples]'`.
"""

import copy
import math
import shlex
import signal
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import Trainer, TrainerCallback
from transformers.integrations import unset_hf_deepspeed_config

from ..models.families import FAMILIES
from ..publishing.cards import decode_state_size, hardware_of, save_model_card
from ..publishing.files import printable
from .plots import METRICS, Metric, plot_training
from .scripts import last_checkpoint


try:
    from peft import PeftModel
except ImportError as error:
    raise ImportError(f"The scripts need {error.name}: run `pip install 'modeling-sumagg[examples]'`.") from error


# The value of each metric on each held-out split, by the name of a model: this one, and those that it is compared with.
Results = dict[str, dict[str, dict[str, float]]]
MODEL = "this model"
# What a card says of how a model was trained.
HYPERPARAMETERS = ("learning_rate", "lr_scheduler_type", "weight_decay", "per_device_train_batch_size", "seed")


class StopAtInterrupt(TrainerCallback):
    """The first Ctrl-C ends the training after its step, with a checkpoint; the second one ends the program."""

    def __init__(self):
        self.is_asked = False
        self.handler: Any = None

    def on_train_begin(self, args, state, control, **kwargs):
        # Of several processes each would stop at another step.
        if args.world_size == 1 and threading.current_thread() is threading.main_thread():
            self.handler = signal.signal(signal.SIGINT, self._ask)

    def _ask(self, signum, frame):
        self.is_asked = True
        self._restore()
        print("\nStops after this step, with a checkpoint. Ctrl-C once more stops at once.", file=sys.stderr)

    def on_step_end(self, args, state, control, **kwargs):
        if self.is_asked:
            control.should_save = control.should_training_stop = True
            control.should_evaluate = False

    def on_train_end(self, args, state, control, **kwargs):
        self._restore()

    def _restore(self):
        if self.handler is not None:
            signal.signal(signal.SIGINT, self.handler)
            self.handler = None


def train_and_evaluate(trainer: Trainer, held_out: dict[str, Any], metrics: Sequence[str]) -> Results:
    """
    Train, or resume the training, save the model to `trainer.args.output_dir`, and evaluate it; of adapters also evaluate
    the model before the training.

    Args:
        trainer (`Trainer`): before training.
        held_out (`dict[str, Dataset]`): the splits to evaluate on, by name, `validation` among them.
        metrics (`Sequence[str]`): the names of the metrics that its `compute_metrics` returns.

    Returns:
        `Results`: of `MODEL` and, with adapters, of "before training".

    Raises:
        `KeyboardInterrupt`: Ctrl-C; the message says how to resume.
    """
    folder = Path(trainer.args.output_dir)
    prefixes = {split: "eval" if split == "validation" else split for split in held_out}

    def evaluate() -> tuple[dict[str, dict[str, float]], dict[str, dict[str, float]]]:
        measured = {
            split: trainer.evaluate(rows, metric_key_prefix=prefixes[split]) for split, rows in held_out.items()
        }
        named = {
            split: {name: float(values[f"{prefixes[split]}_{name}"]) for name in metrics}
            for split, values in measured.items()
        }
        return named, measured

    before = evaluate()[0] if isinstance(trainer.accelerator.unwrap_model(trainer.model), PeftModel) else None
    use_cache = getattr(trainer.model.config, "use_cache", None)
    interrupt = StopAtInterrupt()
    trainer.add_callback(interrupt)
    try:
        training = trainer.train(resume_from_checkpoint=trainer.args.resume_from_checkpoint)
    except KeyboardInterrupt as error:
        raise KeyboardInterrupt(_how_to_resume(folder)) from error
    if interrupt.is_asked and trainer.state.global_step < trainer.state.max_steps:
        raise KeyboardInterrupt(_how_to_resume(folder))
    if use_cache is not None:
        # `Trainer` turns it off.
        trainer.model.config.use_cache = use_cache
    trainer.save_model()
    trainer.save_state()
    if trainer.is_world_process_zero():
        # Paths of this machine are in it, and nothing reads it.
        (folder / "training_args.bin").unlink(missing_ok=True)
    results, measured = evaluate()
    trainer.save_metrics("train", training.metrics)
    for split, values in measured.items():
        trainer.save_metrics(prefixes[split], values)
    return {MODEL: results, **({} if before is None else {"before training": before})}


def _how_to_resume(folder: Path) -> str:
    checkpoint = last_checkpoint(folder)
    if checkpoint is None:
        return "no checkpoint was written, so that the training can only start again."
    arguments = [each for each in sys.argv if each not in ("--resume_from_checkpoint", "last")]
    command = shlex.join(["python", *arguments, "--resume_from_checkpoint", "last"])
    return f"{Path(checkpoint).name} is in {printable(str(folder))}. Resume with: {printable(command)}"


def report(
    trainer: Trainer,
    auto_class: Any,
    results: Results,
    held_out: dict[str, Any],
    *,
    base_model: str | None = None,
    hyperparameters: dict[str, Any] | None = None,
    loss_unit: str = "nats",
    pictures: str = "",
    **facts,
) -> None:
    """
    Print how good the trained model and its baselines are, draw the training, write the card, and check that the model
    loads where this package is not installed. For the main process alone.

    Of adapters also save, in the folder `merged`, the model that they make, which any Auto class loads. A baseline of
    another library gets no card.

    Args:
        trainer (`Trainer`): after [`train_and_evaluate`].
        auto_class: the Auto class of the model, which reads it again where it was trained in pieces.
        results (`Results`): of `MODEL` and of the baselines, at least one, with the same metrics and splits; the first
            metric decides which is better.
        held_out (`dict[str, Dataset]`): the splits of `results`. The `description` of a data set says what it is.
        base_model (`str`, *optional*): the checkpoint that the training began with.
        hyperparameters (`dict`, *optional*): for the card, beside those of `trainer.args`.
        loss_unit (`str`, defaults to `"nats"`): the unit of the loss.
        pictures (`str`, *optional*): what other pictures the script has drawn, for the last line.
        facts: other arguments of [`~modeling_sumagg.publishing.hub.create_model_card`].
    """
    folder = Path(trainer.args.output_dir)
    shown = "test" if "test" in held_out else list(held_out)[-1]
    measured, baselines = results[MODEL], {name: values for name, values in results.items() if name != MODEL}
    first = next(iter(measured[shown]))
    metric = METRICS.get(first, Metric(first))
    endless = [
        f"{name} of {model} is {value}"
        for model, by_split in results.items()
        for name, value in by_split[shown].items()
        if not math.isfinite(value)
    ]
    if endless:
        print(f"\nNo card and no picture: {'; '.join(endless)}. Where the loss rises, give a smaller --learning_rate.")
    else:
        plot_training(
            trainer.state.log_history,
            folder / "training.png",
            metric=first,
            baselines={name: by_split["validation"][first] for name, by_split in baselines.items()},
            model_name=type(trainer.accelerator.unwrap_model(trainer.model)).__name__,
            loss_unit=loss_unit,
            logarithmic=metric.logarithmic,
        )
        _save_checked(
            trainer,
            auto_class,
            hyperparameters or {},
            base_model=base_model,
            dataset_name=_describe(trainer.train_dataset, "the training data", count=True),
            evaluated_on=_describe(held_out[shown], f"the {shown} split"),
            num_examples=len(held_out[shown]) if hasattr(held_out[shown], "__len__") else None,
            metrics=measured[shown],
            baselines={name: by_split[shown] for name, by_split in baselines.items()},
            **facts,
        )
    print_results(results, list(held_out))
    sign = -1 if metric.is_better_lower else 1
    better = [
        name
        for name, by_split in baselines.items()
        if not sign * by_split[shown][first] < sign * measured[shown][first]
    ]
    if better:
        print(f"The model is no better than: {', '.join(better)}.")
    title = metric.title.lower() if metric.title[1:].islower() else metric.title
    drawn = "" if endless else f"; training.png shows loss and {title} by step{pictures}"
    print(f"Saved to {printable(str(folder))}{drawn}.")


def print_results(results: Results, splits: Sequence[str]) -> None:
    """A table of each metric, with a column for each split and a line for each model."""
    for name in next(iter(results.values()))[splits[0]]:
        metric = METRICS.get(name, Metric(name))
        print(f"\n{metric.title:16}{''.join(f'{split:>12}' for split in splits)}")
        for model, by_split in results.items():
            cells = [format(by_split[split][name], ".2%" if metric.is_share else ".4g") for split in splits]
            print(f"{'':16}{''.join(f'{cell:>12}' for cell in cells)}  {model}")


def _describe(dataset: Any, default: str, count: bool = False) -> str:
    description = getattr(getattr(dataset, "info", None), "description", "") or default
    return f"{description}, {len(dataset):,} examples" if count and hasattr(dataset, "__len__") else description


def _save_checked(trainer: Trainer, auto_class: Any, hyperparameters: dict[str, Any], **facts) -> None:
    """Write the card of the model, and of merged adapters, and check that both load; say how large the state is."""
    folder, arguments = Path(trainer.args.output_dir), trainer.args
    model = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
    hardware = hardware_of(model)
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        # One process alone cannot run the pieces.
        unset_hf_deepspeed_config()
        model = auto_class.from_pretrained(folder)
    saved = {folder: model}
    if isinstance(model, PeftModel):
        merged = folder / "merged"
        saved[merged] = copy.deepcopy(model).merge_and_unload()
        saved[merged].save_pretrained(merged)
        if trainer.processing_class is not None:
            trainer.processing_class.save_pretrained(merged)
    if model.config.model_type not in FAMILIES:
        return
    values = {name: getattr(arguments, name) for name in HYPERPARAMETERS}
    if arguments.gradient_accumulation_steps > 1:
        values["gradient_accumulation_steps"] = arguments.gradient_accumulation_steps
    if arguments.world_size > 1:
        values["processes"] = arguments.world_size
    for place, each in saved.items():
        print(f"\nThe check of {printable(str(place))}, where this package is not installed:")
        save_model_card(
            each,
            place,
            hyperparameters=values | hyperparameters,
            steps=trainer.state.global_step,
            hardware=hardware,
            **facts,
        )
    state = decode_state_size(saved[list(saved)[-1]])
    if state is not None:
        constant, per_token = state
        print(
            f"Decode state of one sequence: {constant:,} bytes"
            + (
                f", and {per_token:,} bytes a token for the keys and values of its attention layers. Without these "
                "(`layer_types` in --config_overrides) it would not grow."
                if per_token
                else ", however long it is."
            )
        )


__all__ = ["MODEL", "Results", "StopAtInterrupt", "print_results", "report", "train_and_evaluate"]
