"""Train or fine-tune a causal language model with `Trainer`, save it, reload it, and compare it with a baseline.

Without arguments: a small summation model on the sources of Python's standard library, which needs no network.

    python examples/run_clm.py
    python examples/run_clm.py --config_overrides '{"model_type": "tost_text"}' --packing flattened
    python examples/run_clm.py --train_file books.parquet --preset sumagg-hybrid-small --num_train_epochs 3 --bf16
    python examples/run_clm.py --dataset_name Salesforce/wikitext --dataset_config_name wikitext-2-raw-v1 \
        --model_name_or_path runs/clm --streaming --max_steps 1000 --output_dir runs/wikitext
"""

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import torch
from datasets import DatasetDict, IterableDatasetDict
from embedded_data import standard_library_sources
from torch.nn import functional as F
from training_utils import (
    SMALL_MODEL,
    Task,
    TextDataArguments,
    TextModelArguments,
    build_trainer,
    concatenated_blocks,
    load_config,
    load_metric,
    load_model,
    load_splits,
    load_tokenizer,
    parse_arguments,
    report,
    train_and_evaluate,
    unigram_cross_entropy,
)
from transformers import (
    AutoModelForCausalLM,
    DataCollatorForSeq2Seq,
    DataCollatorWithFlattening,
    EvalPrediction,
    PreTrainedTokenizerBase,
    TrainingArguments,
    default_data_collator,
    set_seed,
)


@dataclass
class LanguageModelingArguments(TextDataArguments):
    block_size: int = field(default=256, metadata={"help": "The longest sequence to train on, in tokens."})
    packing: Literal["blocks", "flattened", "padded"] = field(
        default="blocks",
        metadata={
            "help": "How documents become batches. blocks: all joined, and cut into blocks of equal length. flattened: "
            "the documents of a batch laid end to end in one row, with positions that restart, so that none sees "
            "another. padded: a document a row, padded."
        },
    )


def tokenize(
    splits: DatasetDict | IterableDatasetDict, tokenizer: PreTrainedTokenizerBase, packing: str, block_size: int
) -> DatasetDict | IterableDatasetDict:
    """`input_ids` and `labels`, from documents of which each ends with the end-of-text token."""

    def to_sequences(batch: dict[str, list]) -> dict[str, list]:
        documents = tokenizer([text or "" for text in batch["text"]], add_special_tokens=False)["input_ids"]
        if packing == "blocks":
            sequences = list(concatenated_blocks(documents, tokenizer.eos_token_id, block_size))
        else:
            documents = ([*document, tokenizer.eos_token_id] for document in documents)
            sequences = [
                document[start : start + block_size]
                for document in documents
                for start in range(0, len(document), block_size)
            ]
            # A single token predicts nothing.
            sequences = [sequence for sequence in sequences if len(sequence) > 1]
        return {"input_ids": sequences, "labels": [list(sequence) for sequence in sequences]}

    return splits.map(to_sequences, batched=True, remove_columns=["text"])


def token_losses(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Negative log-likelihood `[B, T - 1]` of every label but the first; 0 where the label is -100."""
    return F.cross_entropy(logits[:, :-1].transpose(1, 2).float(), labels[:, 1:], reduction="none")


def perplexity_metrics() -> Callable[[EvalPrediction], dict[str, float]]:
    """`compute_metrics` for what [`token_losses`] returns: exact whatever the padding of the batches."""
    metric = load_metric("perplexity")

    def compute_metrics(outputs: EvalPrediction) -> dict[str, float]:
        labels = outputs.label_ids[:, 1:]
        predicted = labels != -100
        return metric.compute(predictions=outputs.predictions[predicted], references=labels[predicted])

    return compute_metrics


def prepare(
    model_arguments: TextModelArguments,
    data_arguments: LanguageModelingArguments,
    training_arguments: TrainingArguments,
) -> Task:
    splits = load_splits(
        data_arguments,
        standard_library_sources,
        {"text": data_arguments.text_column_name},
        training_arguments.seed,
    )
    tokenizer = load_tokenizer(model_arguments, (row["text"] or "" for row in splits["train"]))
    config = load_config(model_arguments, SMALL_MODEL, tokenizer)
    model = load_model(AutoModelForCausalLM, model_arguments, config)
    print(f"{type(model).__name__}, {model.num_parameters():,} parameters, layers {config.layer_types}")
    sequences = tokenize(splits, tokenizer, data_arguments.packing, data_arguments.block_size)
    train, validation = sequences["train"], sequences["validation"]
    if data_arguments.streaming:
        train = train.shuffle(seed=training_arguments.seed, buffer_size=1000)
    elif not len(train) or not len(validation):
        raise ValueError(
            f"{data_arguments.source} makes {len(train)} training and {len(validation)} held-out sequences: both need "
            "one. Give more text, or a smaller --block_size."
        )

    def baselines() -> dict[str, dict[str, float]]:
        # Of a stream, count as many sequences as the model was trained on.
        seen_a_step = training_arguments.train_batch_size * training_arguments.world_size
        seen = training_arguments.max_steps * seen_a_step * training_arguments.gradient_accumulation_steps
        cross_entropy = unigram_cross_entropy(
            (row["input_ids"] for row in itertools.islice(train, seen if data_arguments.streaming else None)),
            (row["input_ids"] for row in validation),
            config.vocab_size,
        )
        return {"unigram frequencies": {"validation": math.exp(cross_entropy)}}

    collators = {
        "blocks": default_data_collator,
        "flattened": DataCollatorWithFlattening(),
        "padded": DataCollatorForSeq2Seq(tokenizer),
    }
    return Task(
        auto_class=AutoModelForCausalLM,
        model=model,
        processing_class=tokenizer,
        train_dataset=train,
        held_out={"validation": validation},
        trainer_arguments={
            "data_collator": collators[data_arguments.packing],
            "compute_metrics": perplexity_metrics(),
            "preprocess_logits_for_metrics": token_losses,
        },
        source=data_arguments.source,
        metric="perplexity",
        baselines=baselines,
    )


def main() -> None:
    arguments = parse_arguments(
        (TextModelArguments, LanguageModelingArguments, TrainingArguments),
        output_dir="runs/clm",
        num_train_epochs=0.5,
        per_device_train_batch_size=4,
        per_device_eval_batch_size=4,
        learning_rate=2e-3,
        lr_scheduler_type="cosine",
        warmup_steps=0.1,
        weight_decay=0.1,
        eval_strategy="steps",
        eval_steps=0.34,
        logging_steps=0.05,
        save_strategy="no",
    )
    training_arguments = arguments[-1]
    set_seed(training_arguments.seed)
    task = prepare(*arguments)
    trainer = build_trainer(task, training_arguments)
    perplexity = train_and_evaluate(trainer, task)
    if trainer.is_world_process_zero():
        report(trainer, task, perplexity)


if __name__ == "__main__":
    main()
