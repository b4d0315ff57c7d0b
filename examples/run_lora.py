"""Adapt a checkpoint of any of the model families with LoRA (PEFT), save the adapters, reload them, and merge them.

Without arguments: a small language model is trained on Python's standard library for a minute, and then learns, through
adapters alone, which package a piece of code is from. That needs no network. The options of a task are those of its own
script: `python examples/run_lora.py --task image-classification --help` shows them.

    python examples/run_lora.py
    python examples/run_lora.py --task text-generation --model_name_or_path runs/clm --train_file notes.txt \
        --validation_file more-notes.txt
    python examples/run_lora.py --task image-classification --model_name_or_path runs/image-classification
    python examples/run_lora.py --task multimodal-regression --model_name_or_path runs/multimodal-regression
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import run_clm
import run_image_classification
import run_multimodal_regression
import run_text_classification
import torch
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from training_utils import (
    ModelArguments,
    Task,
    TextModelArguments,
    build_trainer,
    load_model,
    parse_arguments,
    plot_training,
    print_comparison,
    save_model_card,
    train_and_evaluate,
)
from transformers import HfArgumentParser, PreTrainedModel, TrainingArguments, set_seed

from modeling_sumagg.training import LORA_TARGET_MODULES


class Script(NamedTuple):
    """The script of a task: its arguments, what prepares its model and data, and what an adapted model gets."""

    model_arguments: type
    data_arguments: type
    prepare: Callable[..., Task]
    task_type: TaskType | None
    # What a base model of another task does not have is trained whole and saved with the adapters.
    new_modules: list[str] | None = None
    # Layers to adapt beside those that mix tokens.
    more_targets: tuple[str, ...] = ()
    defaults: dict[str, Any] = {}


SCRIPTS = {
    "text-generation": Script(
        TextModelArguments, run_clm.LanguageModelingArguments, run_clm.prepare, TaskType.CAUSAL_LM
    ),
    "text-classification": Script(
        TextModelArguments,
        run_text_classification.ClassificationArguments,
        run_text_classification.prepare,
        TaskType.SEQ_CLS,
        ["score", "pooler"],
        # Which words there are tells most about a document.
        ("embed_tokens",),
        {"max_length": 512, "learning_rate": 1e-2},
    ),
    "image-classification": Script(
        ModelArguments,
        run_image_classification.ImageArguments,
        run_image_classification.prepare,
        None,
        # The batch norms of the patch embedding move while training.
        ["classifier", "patch_embeddings"],
    ),
    "multimodal-regression": Script(
        TextModelArguments,
        run_multimodal_regression.RegressionArguments,
        run_multimodal_regression.prepare,
        None,
        ["numeric_branch", "score"],
    ),
}


@dataclass
class LoraArguments:
    task: Literal["text-generation", "text-classification", "image-classification", "multimodal-regression"] = field(
        default="text-classification", metadata={"help": "What the adapted model is for."}
    )
    lora_rank: int = field(default=8, metadata={"help": "Rank of the update of each adapted weight."})
    lora_alpha: int = field(default=16, metadata={"help": "The update is scaled by alpha / rank."})
    lora_dropout: float = field(default=0.0, metadata={"help": "Dropout before the adapters."})
    target_modules: list[str] | None = field(
        default=None,
        metadata={
            "help": "Names of the layers to adapt; by default those that mix tokens, and a classifier's embeddings."
        },
    )
    base_steps: int = field(
        default=400, metadata={"help": "Steps of the language model that is trained if no checkpoint is given."}
    )


def check_logits(model: PeftModel, reloaded: PreTrainedModel | PeftModel, inputs: dict, folder: Path) -> None:
    """Compare what was saved in `folder` with the trained model, and raise a `RuntimeError` if the logits differ."""
    with torch.no_grad():
        expected, logits = (each.to("cpu").eval()(**inputs).logits for each in (model, reloaded))
    difference = (expected - logits).abs().max().item()
    # Merging rounds the sum of a weight and its update.
    if difference > 1e-4 * expected.abs().max().item():
        raise RuntimeError(f"The model saved in {folder} gives other logits than the trained one, by {difference}.")


def train_base_model(folder: str, steps: int, vocab_size: int, training_arguments: TrainingArguments) -> None:
    """Train a small language model of the standard library and save it in `folder`."""
    base_arguments = copy.copy(training_arguments)
    base_arguments.output_dir = folder
    base_arguments.max_steps = steps
    base_arguments.per_device_train_batch_size = 4
    base_arguments.learning_rate, base_arguments.weight_decay = 2e-3, 0.1
    base_arguments.logging_strategy, base_arguments.logging_steps = "steps", 0.1
    base_arguments.eval_strategy = base_arguments.save_strategy = "no"
    # Half the layers of what run_clm.py trains, in a minute.
    model_arguments = TextModelArguments(vocab_size=vocab_size, config_overrides='{"num_hidden_layers": 2}')
    task = run_clm.prepare(model_arguments, run_clm.LanguageModelingArguments(), base_arguments)
    trainer = build_trainer(task, base_arguments)
    trainer.train()
    trainer.save_model()


def main() -> None:
    # The task decides which options there are.
    parser = HfArgumentParser(LoraArguments, add_help=False, allow_abbrev=False)
    arguments, _ = parser.parse_args_into_dataclasses(return_remaining_strings=True)
    script = SCRIPTS[arguments.task]
    defaults = {
        "output_dir": "runs/lora",
        "num_train_epochs": 4,
        "learning_rate": 2e-3,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0.1,
        "eval_strategy": "epoch",
        "logging_strategy": "epoch",
        "save_strategy": "no",
        "remove_unused_columns": False,
    }
    arguments, model_arguments, data_arguments, training_arguments = parse_arguments(
        (LoraArguments, script.model_arguments, script.data_arguments, TrainingArguments),
        **{**defaults, **script.defaults},
    )
    set_seed(training_arguments.seed)
    output_dir = Path(training_arguments.output_dir)
    if model_arguments.model_name_or_path is None:
        if not arguments.task.startswith("text-"):
            name = arguments.task.replace("-", "_")
            raise ValueError(f"Give a --model_name_or_path, such as what run_{name}.py saved.")
        model_arguments.model_name_or_path = str(output_dir / "base")
        train_base_model(
            model_arguments.model_name_or_path,
            arguments.base_steps,
            model_arguments.vocab_size,
            training_arguments,
        )

    task = script.prepare(model_arguments, data_arguments, training_arguments)
    config, name = task.model.config, type(task.model).__name__
    lora_config = LoraConfig(
        task_type=script.task_type,
        r=arguments.lora_rank,
        lora_alpha=arguments.lora_alpha,
        lora_dropout=arguments.lora_dropout,
        target_modules=arguments.target_modules or [*LORA_TARGET_MODULES[config.model_type], *script.more_targets],
        modules_to_save=script.new_modules,
    )
    task.model = get_peft_model(task.model, lora_config)
    task.model.print_trainable_parameters()
    # PEFT hides the names of the inputs and of the labels.
    training_arguments.label_names = ["labels"]
    trainer = build_trainer(task, training_arguments)
    before = {split: trainer.predict(rows).metrics[f"test_{task.metric}"] for split, rows in task.held_out.items()}
    values = train_and_evaluate(trainer, task)
    if not trainer.is_world_process_zero():
        return

    trained = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
    # The adapters on the base model once more, then one model without adapters, which any Auto class loads.
    reloaded = PeftModel.from_pretrained(load_model(task.auto_class, model_arguments, config), output_dir)
    inputs = trainer.data_collator([next(iter(task.held_out["validation"]))])
    check_logits(trained, reloaded, inputs, output_dir)
    merged, merged_dir = reloaded.merge_and_unload(), output_dir / "merged"
    merged.save_pretrained(merged_dir)
    task.processing_class.save_pretrained(merged_dir)
    check_logits(trained, task.auto_class.from_pretrained(merged_dir), inputs, merged_dir)

    baselines = {**task.baselines(), "before training": before}
    references = {baseline: by_split["validation"] for baseline, by_split in baselines.items()}
    plot_training(trainer.state.log_history, task.metric, references, output_dir / "training.png")
    *_, reported = task.held_out
    save_model_card(
        trainer,
        merged,
        merged_dir,
        task.source,
        {task.metric: values[reported]},
        {baseline: {task.metric: by_split[reported]} for baseline, by_split in baselines.items()},
        base_model=model_arguments.model_name_or_path,
        lora_rank=arguments.lora_rank,
        lora_alpha=arguments.lora_alpha,
    )
    print_comparison(task.metric, {f"{name}, adapted": values, **baselines})
    print(f"Saved and reloaded: the adapters from {output_dir}, the merged model from {merged_dir}.")


if __name__ == "__main__":
    main()
