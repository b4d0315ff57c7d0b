"""Adapt a checkpoint of any of the model families with LoRA (PEFT), save the adapters, reload them, and merge them.

Without arguments: a small language model is trained on Python's standard library for a minute, and then learns, through
adapters alone, which package a piece of code is from. That needs no network.

    python examples/run_lora.py
    python examples/run_lora.py --task text-generation --model_name_or_path runs/clm --train_file notes.txt \
        --validation_file more-notes.txt
    python examples/run_lora.py --task image-classification --model_name_or_path runs/tost-digits
"""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from datasets import ClassLabel
from embedded_data import handwritten_digits, standard_library_packages, standard_library_sources
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from run_clm import perplexity_metrics, token_losses
from run_clm import tokenize as tokenize_for_generation
from run_text_classification import baseline_accuracies, encode_labels, label_names
from run_text_classification import tokenize as tokenize_for_classification
from training_utils import (
    SMALL_MODEL,
    DataArguments,
    ModelArguments,
    WeightDecayTrainer,
    accuracy_metrics,
    load_config,
    load_model,
    load_splits,
    load_tokenizer,
    parse_arguments,
    plot_training,
    unigram_cross_entropy,
)
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    DefaultDataCollator,
    PreTrainedModel,
    TrainingArguments,
    default_data_collator,
    set_seed,
)

# The top-level name is missing from transformers 5.17 where torchvision is.
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from modeling_sumagg.training import register_lora_target_modules


AUTO_CLASSES = {
    "text-generation": AutoModelForCausalLM,
    "text-classification": AutoModelForSequenceClassification,
    "image-classification": AutoModelForImageClassification,
}
TASK_TYPES = {"text-generation": TaskType.CAUSAL_LM, "text-classification": TaskType.SEQ_CLS}
# What a base model of another task does not have is trained whole and saved with the adapters.
NEW_MODULES = {
    "text-generation": None,
    "text-classification": ["score", "pooler"],
    # The batch norms of the patch embedding move while training.
    "image-classification": ["classifier", "patch_embeddings"],
}


@dataclass
class LoraArguments(DataArguments):
    task: Literal["text-generation", "text-classification", "image-classification"] = field(
        default="text-classification", metadata={"help": "What the adapted model is for."}
    )
    label_column_name: str = field(default="label", metadata={"help": "Column with the classes."})
    image_column_name: str = field(default="image", metadata={"help": "Column with the images."})
    max_length: int = field(default=512, metadata={"help": "The longest sequence, in tokens."})
    lora_rank: int = field(default=8, metadata={"help": "Rank of the update of each adapted weight."})
    lora_alpha: int = field(default=16, metadata={"help": "The update is scaled by alpha / rank."})
    lora_dropout: float = field(default=0.0, metadata={"help": "Dropout before the adapters."})
    target_modules: list[str] | None = field(
        default=None, metadata={"help": "Names of the layers to adapt; by default those that mix tokens."}
    )
    base_steps: int = field(
        default=300, metadata={"help": "Steps of the language model that is trained if no checkpoint is given."}
    )

    def __post_init__(self):
        super().__post_init__()
        if self.streaming:
            raise ValueError("--streaming is for run_clm.py.")


def label_maps(names: list[str]) -> dict[str, dict]:
    return {"id2label": dict(enumerate(names)), "label2id": {name: index for index, name in enumerate(names)}}


def check_logits(model: PeftModel, reloaded: PreTrainedModel | PeftModel, inputs: dict, folder: Path) -> None:
    """Compare what was saved in `folder` with the trained model, and raise a `RuntimeError` if the logits differ."""
    with torch.no_grad():
        expected, logits = (each.to("cpu").eval()(**inputs).logits for each in (model, reloaded))
    difference = (expected - logits).abs().max().item()
    # Merging rounds the sum of a weight and its update.
    if difference > 1e-4 * expected.abs().max().item():
        raise RuntimeError(f"The model saved in {folder} gives other logits than the trained one, by {difference}.")


def train_base_model(folder: str, steps: int, vocab_size: int, seed: int) -> None:
    """Train a small language model of the standard library and save it in `folder`."""
    new_model = ModelArguments(vocab_size=vocab_size)
    splits = standard_library_sources().select_columns(["text"])
    tokenizer = load_tokenizer(new_model, splits["train"]["text"])
    model = load_model(AutoModelForCausalLM, new_model, load_config(new_model, tokenizer, SMALL_MODEL))
    blocks = tokenize_for_generation(splits, tokenizer, "blocks", 256)
    training_arguments = TrainingArguments(
        output_dir=folder,
        max_steps=steps,
        learning_rate=2e-3,
        warmup_steps=0.1,
        logging_steps=0.1,
        save_strategy="no",
        report_to="none",
        dataloader_pin_memory=torch.accelerator.is_available(),
        seed=seed,
    )
    trainer = WeightDecayTrainer(
        model=model,
        args=training_arguments,
        train_dataset=blocks["train"],
        processing_class=tokenizer,
        data_collator=default_data_collator,
    )
    trainer.train()
    trainer.save_model()


def prepare_text_generation(
    model_arguments: ModelArguments, arguments: LoraArguments, seed: int
) -> tuple[dict, str, dict[str, float]]:
    """The model and the data as arguments of `Trainer`, the metric's name, and its value for simple baselines."""
    columns = {"text": arguments.text_column_name}
    splits = load_splits(arguments, standard_library_sources, columns, seed)
    tokenizer = AutoTokenizer.from_pretrained(model_arguments.tokenizer_name or model_arguments.model_name_or_path)
    config = load_config(model_arguments, tokenizer, {})
    blocks = tokenize_for_generation(splits, tokenizer, "blocks", arguments.max_length)
    cross_entropy = unigram_cross_entropy(
        blocks["train"]["input_ids"], blocks["validation"]["input_ids"], config.vocab_size
    )
    trainer_arguments = {
        "model": load_model(AutoModelForCausalLM, model_arguments, config),
        "processing_class": tokenizer,
        "train_dataset": blocks["train"],
        "eval_dataset": blocks["validation"],
        "data_collator": default_data_collator,
        "compute_metrics": perplexity_metrics(),
        "preprocess_logits_for_metrics": token_losses,
    }
    return trainer_arguments, "perplexity", {"unigram frequencies": math.exp(cross_entropy)}


def prepare_text_classification(
    model_arguments: ModelArguments, arguments: LoraArguments, seed: int
) -> tuple[dict, str, dict[str, float]]:
    columns = {"text": arguments.text_column_name, "label": arguments.label_column_name}
    splits = load_splits(arguments, standard_library_packages, columns, seed)
    names = label_names(splits)
    splits = encode_labels(splits, names)
    tokenizer = AutoTokenizer.from_pretrained(model_arguments.tokenizer_name or model_arguments.model_name_or_path)
    config = load_config(model_arguments, tokenizer, {}, **label_maps(names))
    sequences = tokenize_for_classification(splits, tokenizer, arguments.max_length)
    trainer_arguments = {
        "model": load_model(AutoModelForSequenceClassification, model_arguments, config),
        "processing_class": tokenizer,
        "train_dataset": sequences["train"],
        "eval_dataset": sequences["validation"],
        "data_collator": DataCollatorWithPadding(tokenizer),
        "compute_metrics": accuracy_metrics(),
    }
    baselines = baseline_accuracies(splits, ["validation"])
    return trainer_arguments, "accuracy", {name: values["validation"] for name, values in baselines.items()}


def prepare_image_classification(
    model_arguments: ModelArguments, arguments: LoraArguments, seed: int
) -> tuple[dict, str, dict[str, float]]:
    columns = {"image": arguments.image_column_name, "label": arguments.label_column_name}
    splits = load_splits(arguments, handwritten_digits, columns, seed)
    if not isinstance(splits["train"].features["label"], ClassLabel):
        splits = splits.class_encode_column("label")
    names = label_names(splits)
    image_processor = AutoImageProcessor.from_pretrained(model_arguments.model_name_or_path)
    config = load_config(model_arguments, image_processor, {}, **label_maps(names))

    def preprocess(batch: dict[str, list]) -> dict[str, list]:
        return {"pixel_values": image_processor(batch["image"])["pixel_values"], "labels": batch["label"]}

    processed = splits.with_transform(preprocess)
    trainer_arguments = {
        "model": load_model(AutoModelForImageClassification, model_arguments, config),
        "processing_class": image_processor,
        "train_dataset": processed["train"],
        "eval_dataset": processed["validation"],
        "data_collator": DefaultDataCollator(),
        "compute_metrics": accuracy_metrics(),
    }
    counts = np.bincount(splits["train"]["label"], minlength=len(names))
    most_frequent = np.mean(np.array(splits["validation"]["label"]) == counts.argmax())
    return trainer_arguments, "accuracy", {"most frequent class": float(most_frequent)}


PREPARE = {
    "text-generation": prepare_text_generation,
    "text-classification": prepare_text_classification,
    "image-classification": prepare_image_classification,
}


def main() -> None:
    model_arguments, arguments, training_arguments = parse_arguments(
        (ModelArguments, LoraArguments, TrainingArguments),
        output_dir="runs/lora",
        num_train_epochs=5,
        learning_rate=2e-3,
        lr_scheduler_type="cosine",
        warmup_steps=0.1,
        eval_strategy="epoch",
        logging_strategy="epoch",
        save_strategy="no",
        remove_unused_columns=False,
    )
    set_seed(training_arguments.seed)
    output_dir = Path(training_arguments.output_dir)
    if model_arguments.model_name_or_path is None:
        if arguments.task == "image-classification":
            raise ValueError("Give a --model_name_or_path, such as what run_image_classification.py saved.")
        model_arguments.model_name_or_path = str(output_dir / "base")
        train_base_model(
            model_arguments.model_name_or_path,
            arguments.base_steps,
            model_arguments.vocab_size,
            training_arguments.seed,
        )

    trainer_arguments, metric, baselines = PREPARE[arguments.task](model_arguments, arguments, training_arguments.seed)
    base_config = trainer_arguments["model"].config
    register_lora_target_modules()
    lora_config = LoraConfig(
        task_type=TASK_TYPES.get(arguments.task),
        r=arguments.lora_rank,
        lora_alpha=arguments.lora_alpha,
        lora_dropout=arguments.lora_dropout,
        target_modules=arguments.target_modules,
        modules_to_save=NEW_MODULES[arguments.task],
    )
    model = get_peft_model(trainer_arguments.pop("model"), lora_config)
    model.print_trainable_parameters()
    # PEFT hides the names of the inputs and of the labels.
    training_arguments.label_names = ["labels"]
    trainer = WeightDecayTrainer(model=model, args=training_arguments, **trainer_arguments)
    before = trainer.evaluate()[f"eval_{metric}"]
    training = trainer.train(resume_from_checkpoint=training_arguments.resume_from_checkpoint)
    trainer.save_model()
    trainer.save_state()
    trainer.log_metrics("train", training.metrics)
    trainer.save_metrics("train", training.metrics)
    metrics = trainer.evaluate()
    trainer.log_metrics("eval", metrics)
    trainer.save_metrics("eval", metrics)
    if not trainer.is_world_process_zero():
        return

    # The adapters on the base model once more, then one model without adapters, which any Auto class loads.
    auto_class = AUTO_CLASSES[arguments.task]
    reloaded = PeftModel.from_pretrained(load_model(auto_class, model_arguments, base_config), output_dir)
    inputs = trainer.data_collator([trainer.eval_dataset[0]])
    check_logits(model, reloaded, inputs, output_dir)
    merged_dir = output_dir / "merged"
    reloaded.merge_and_unload().save_pretrained(merged_dir)
    trainer.processing_class.save_pretrained(merged_dir)
    check_logits(model, auto_class.from_pretrained(merged_dir), inputs, merged_dir)
    baselines["without training"] = before
    plot_training(trainer.state.log_history, metric, baselines, output_dir / "training.png")

    value = metrics[f"eval_{metric}"]
    print(
        f"\n{metric.capitalize()} on the held-out data\n  {value:10.4g}  {type(reloaded.base_model.model).__name__}, adapted"
    )
    for name, baseline in baselines.items():
        print(f"  {baseline:10.4g}  {name}")
    better = [
        name for name, other in baselines.items() if (other <= value) == (metric == "perplexity") or other == value
    ]
    if better:
        print(f"The adapted model is no better than: {', '.join(better)}.")
    print(f"Saved and reloaded: the adapters from {output_dir}, the merged model from {merged_dir}.")


if __name__ == "__main__":
    main()
