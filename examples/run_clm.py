"""Train or fine-tune a causal language model with `Trainer`, and compare it with the frequencies of the tokens.

Without arguments: a small summation model on the sources of Python's standard library, which needs no network.

    python run_clm.py
    python run_clm.py --config_overrides '{"model_type": "tost_text"}' --packing flattened
    python run_clm.py --train_file books.parquet --preset sumagg-hybrid-small --num_train_epochs 3 --bf16
    python run_clm.py --dataset_name Salesforce/wikitext --dataset_config_name wikitext-2-raw-v1 \
        --model_name_or_path runs/clm --streaming --max_steps 1000 --output_dir runs/wikitext
    python run_clm.py --model_name_or_path runs/clm --train_file notes.txt --validation_file more-notes.txt \
        --lora_rank 8 --output_dir runs/notes
"""

import copy
import itertools
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal


# Threads that wait for each other sleep, and leave the processor to others: read when torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import numpy as np
import torch
from peft import TaskType
from torch.nn import functional as F
from transformers import (
    AutoModelForCausalLM,
    DataCollatorForSeq2Seq,
    DataCollatorWithFlattening,
    EvalPrediction,
    PreTrainedTokenizerBase,
    default_data_collator,
)

from modeling_sumagg.training.chunk_trainer import ChunkTrainer
from modeling_sumagg.training.embedded_data import standard_library_sources
from modeling_sumagg.training.runs import report, train_and_evaluate
from modeling_sumagg.training.scripts import (
    DataArguments,
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


# A model for a few minutes on two cores, with the mixers that a config has by default: decayed, gated sums and one layer
# of rotary attention. `--config_overrides` changes it.
SMALL_MODEL = {
    "model_type": "sumagg",
    "hidden_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 1024,
}


@dataclass
class TextArguments(DataArguments):
    text_column_name: str = field(default="text", metadata={"help": "Column with the texts."})
    streaming: bool = field(default=False, metadata={"help": "Read the data while training; needs --max_steps."})
    held_out_rows: int = field(default=100, metadata={"help": "Rows held out from a stream without such a split."})
    block_size: int = field(default=256, metadata={"help": "The longest sequence to train on, in tokens."})
    chunk_length: int | None = field(
        default=None,
        metadata={
            "help": "Read sequences in chunks of so many tokens, in the memory of one and with the same gradients: for a "
            "--block_size of up to millions."
        },
    )
    sequence_parallel: bool = field(
        default=False,
        metadata={"help": "Cut each sequence, or each chunk of it, over all processes of torchrun."},
    )
    packing: Literal["blocks", "flattened", "padded"] = field(
        default="blocks",
        metadata={
            "help": "How documents become batches. blocks: all joined, and cut into blocks of equal length. flattened: "
            "the documents of a batch laid end to end in one row, with positions that restart, so that none sees "
            "another. padded: a document a row, padded."
        },
    )


def to_sequences(
    texts: list[str | None],
    tokenizer: PreTrainedTokenizerBase,
    packing: str,
    block_size: int,
    keep_short: bool = False,
) -> dict[str, list[list[int]]]:
    """
    `input_ids` and `labels` of at most `block_size` tokens, from texts of which each ends with the end-of-text token.
    With `keep_short`, tokens that are too few for one block are a shorter one.
    """
    documents = tokenizer([text or "" for text in texts], add_special_tokens=False)["input_ids"]
    documents = [[*document, tokenizer.eos_token_id] for document in documents]
    if packing == "blocks":
        documents = [list(itertools.chain(*documents))]
        # The last block, which is not whole, is dropped.
        whole = len(documents[0]) // block_size * block_size
        documents[0] = documents[0][: len(documents[0]) if keep_short and not whole else whole]
    sequences = [
        document[start : start + block_size] for document in documents for start in range(0, len(document), block_size)
    ]
    # A single token predicts nothing.
    sequences = [sequence for sequence in sequences if len(sequence) > 1]
    return {"input_ids": sequences, "labels": [list(sequence) for sequence in sequences]}


def token_losses(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Negative log-likelihood `[B, T - 1]` of every label but the first; 0 where the label is -100."""
    return F.cross_entropy(logits[:, :-1].transpose(1, 2).float(), labels[:, 1:], reduction="none")


def perplexity(outputs: EvalPrediction) -> dict[str, float]:
    """Of the losses that [`token_losses`] returns: exact whatever the padding of the batches."""
    losses = outputs.predictions[outputs.label_ids[:, 1:] != -100]
    return {"perplexity": float(np.exp(np.mean(losses, dtype=np.float64)))}


def unigram_perplexity(training_rows, held_out_rows, vocab_size: int) -> float:
    """The best of all models without a context: the frequencies of the training tokens, add-one smoothed."""
    counts = np.ones(vocab_size)
    for row in training_rows:
        counts += np.bincount(row["input_ids"], minlength=vocab_size)
    losses = -np.log(counts / counts.sum())
    return float(np.exp(np.mean(np.concatenate([losses[row["input_ids"][1:]] for row in held_out_rows]))))


def beginning(texts: Iterable[str]) -> str:
    """The first words of the first text that has some, for the card's call of `generate`."""
    line = next(line for text in texts for line in (text or "").splitlines() if line.strip())
    return line.strip()[:40].rpartition(" ")[0] or line.strip()[:40]


def main() -> None:
    with user_errors():
        data_arguments, model_arguments, training_arguments = parse_arguments(
            (TextArguments, TextModelArguments),
            __doc__,
            output_dir="runs/clm",
            num_train_epochs=0.5,
            per_device_train_batch_size=4,
            per_device_eval_batch_size=4,
            learning_rate=2e-3,
            weight_decay=0.1,
            eval_strategy="steps",
            eval_steps=0.34,
            logging_steps=0.05,
        )
        is_own = data_arguments.dataset_name or data_arguments.train_file
        source = source_of(data_arguments, "Python's standard library")
        duration = "the progress bar shows how long" if is_own else "about 3 minutes on two cores"
        print(f"Trains a language model on {source} and saves it to {training_arguments.output_dir} ({duration}).")
        if data_arguments.streaming and training_arguments.max_steps <= 0:
            raise ValueError("A stream has no end that is known: --streaming needs --max_steps.")
        splits = load_splits(
            data_arguments,
            standard_library_sources,
            {"text": data_arguments.text_column_name},
            seed=training_arguments.seed,
            embedded_name=source,
            streaming=data_arguments.streaming,
            held_out_rows=data_arguments.held_out_rows,
        )
        tokenizer = load_tokenizer(model_arguments, (row["text"] or "" for row in splits["train"]))
        config = load_config(model_arguments, SMALL_MODEL, tokenizer)
        model = load_model(AutoModelForCausalLM, model_arguments, config)
        packing, block_size = data_arguments.packing, data_arguments.block_size
        in_chunks = data_arguments.chunk_length is not None
        sequences = splits.map(
            lambda batch: to_sequences(batch["text"], tokenizer, packing, block_size, keep_short=in_chunks),
            batched=True,
            # Enough texts for a long block.
            batch_size=max(1000, block_size // 10),
            remove_columns=["text"],
        )
        train, validation = sequences["train"], sequences["validation"]
        if data_arguments.streaming:
            train = train.shuffle(seed=training_arguments.seed, buffer_size=1000)
        elif not len(train) or not len(validation):
            raise ValueError(
                f"{source} makes {len(train)} training and {len(validation)} held-out sequences: both need one. Give "
                "more text, or a smaller --block_size."
            )

    print(f"{type(model).__name__}, {model.num_parameters():,} parameters; a tokenizer of {len(tokenizer):,} tokens.")
    if model_arguments.lora_rank:
        model = add_adapters(model, model_arguments, task_type=TaskType.CAUSAL_LM)
    # Models with absolute positions are trained with padding on the right.
    padding = copy.deepcopy(tokenizer)
    padding.padding_side = "right"
    collators = {
        "blocks": DataCollatorForSeq2Seq(padding) if in_chunks else default_data_collator,
        "flattened": DataCollatorWithFlattening(),
        "padded": DataCollatorForSeq2Seq(padding),
    }
    tokenizer.model_max_length = model_max_length(config)
    trainer = ChunkTrainer(
        model=model,
        args=training_arguments,
        train_dataset=train,
        eval_dataset=validation,
        processing_class=tokenizer,
        data_collator=collators[data_arguments.packing],
        compute_metrics=perplexity,
        preprocess_logits_for_metrics=None if in_chunks else token_losses,
        chunk_length=data_arguments.chunk_length,
        sequence_parallel=data_arguments.sequence_parallel,
    )
    held_out = {"validation": validation}
    results = train_and_evaluate(trainer, held_out, ["perplexity"])
    if not trainer.is_world_process_zero():
        return

    # Of a stream, count as many sequences as the model was trained on.
    seen = training_arguments.max_steps * training_arguments.train_batch_size * training_arguments.world_size
    seen = seen * training_arguments.gradient_accumulation_steps if data_arguments.streaming else None
    unigram = unigram_perplexity(itertools.islice(train, seen), validation, config.vocab_size)
    results["unigram frequencies"] = {"validation": {"perplexity": unigram}}
    report(
        trainer,
        AutoModelForCausalLM,
        results,
        held_out,
        base_model=model_arguments.model_name_or_path,
        loss_unit="nats a token",
        prompt=beginning(row["text"] for row in splits["validation"]),
    )


if __name__ == "__main__":
    run(main)
