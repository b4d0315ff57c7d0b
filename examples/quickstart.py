"""Train a small summation language model on real text, save it, reload it, and let it write. About three minutes.

Without arguments it needs no network: the text is the source code of Python's standard library.

    python quickstart.py
    python quickstart.py --train_files book1.txt book2.txt --held_out_files book3.txt --steps 2000
"""

import math
import os
import time
from dataclasses import dataclass, field
from pathlib import Path


# Threads that wait for each other sleep, and leave the processor to others: read when torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import numpy as np
import torch
from datasets import Dataset
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    GPT2Tokenizer,
    HfArgumentParser,
    TextStreamer,
    TrainingArguments,
    default_data_collator,
    set_seed,
)

from modeling_sumagg import SumAggConfig
from modeling_sumagg.publishing.hub import decode_state_size, save_model_card
from modeling_sumagg.training.data_files import read_document
from modeling_sumagg.training.embedded_data import standard_library_sources
from modeling_sumagg.training.plots import plot_training
from modeling_sumagg.training.scripts import DecayTrainer, check_output_folder, run, user_errors


@dataclass
class QuickstartArguments:
    output_dir: str = field(default="runs/quickstart", metadata={"help": "Where the model and the plot go."})
    steps: int = field(default=1200, metadata={"help": "Training steps."})
    batch_size: int = field(default=4, metadata={"help": "Sequences a step."})
    context_length: int = field(default=256, metadata={"help": "Tokens of a training sequence."})
    vocab_size: int = field(default=4096, metadata={"help": "Tokens of the vocabulary to learn."})
    hidden_size: int = field(default=128, metadata={"help": "Width of the model."})
    num_hidden_layers: int = field(
        default=4, metadata={"help": "Blocks. All sum but the last, which attends to a window."}
    )
    num_attention_heads: int = field(default=4, metadata={"help": "Heads of the blocks."})
    learning_rate: float = field(default=2e-3, metadata={"help": "Highest learning rate, after the warm-up."})
    train_files: list[str] | None = field(default=None, metadata={"help": "UTF-8 text files of your own."})
    held_out_files: list[str] | None = field(default=None, metadata={"help": "Text files to evaluate on."})
    prompt: str = field(default="def read(", metadata={"help": "The text to continue after training."})
    max_new_tokens: int = field(default=120, metadata={"help": "Tokens to write after the prompt."})
    seed: int = field(default=0, metadata={"help": "Seed of the weights, the data order and the sampling."})

    def __post_init__(self):
        if (self.train_files is None) != (self.held_out_files is None):
            raise ValueError("Give both --train_files and --held_out_files, or neither.")


def load_texts(arguments: QuickstartArguments) -> dict[str, list[str]]:
    """The training texts and the held-out ones, a file each."""
    if arguments.train_files is None:
        sources = standard_library_sources()
        return {"train": sources["train"]["text"][:], "held-out": sources["test"]["text"][:]}
    files = {"train": arguments.train_files, "held-out": arguments.held_out_files}
    return {split: [read_document(path) for path in paths] for split, paths in files.items()}


def cut_into_blocks(texts: list[str], tokenizer: GPT2Tokenizer, length: int) -> np.ndarray:
    """The tokens of all texts, an end-of-text token after each, as rows `[blocks, length]`; the rest is dropped."""
    tokens = [token for ids in tokenizer(texts)["input_ids"] for token in (*ids, tokenizer.eos_token_id)]
    if len(tokens) < length:
        raise ValueError(f"{len(tokens)} tokens of text are less than one --context_length of {length}: give more.")
    return np.array(tokens[: len(tokens) // length * length]).reshape(-1, length)


def main() -> None:
    parser = HfArgumentParser(
        QuickstartArguments, description=__doc__.partition("\n\n")[0], usage="%(prog)s [options]", allow_abbrev=False
    )
    with user_errors():
        (arguments,) = parser.parse_args_into_dataclasses()
        duration = (
            "about 3 minutes on two cores" if arguments.train_files is None else "the progress bar shows how long"
        )
        check_output_folder(Path(arguments.output_dir))
        print(
            f"Learns a vocabulary, trains a language model for {arguments.steps:,} steps, lets it write and saves it to "
            f"{arguments.output_dir} ({duration})."
        )
        texts = load_texts(arguments)
        tokenizer = GPT2Tokenizer(pad_token="<|endoftext|>", padding_side="left").train_new_from_iterator(
            texts["train"], arguments.vocab_size, length=len(texts["train"])
        )
        blocks = {split: cut_into_blocks(texts[split], tokenizer, arguments.context_length) for split in texts}
    set_seed(arguments.seed)
    datasets = {split: Dataset.from_dict({"input_ids": rows, "labels": rows}) for split, rows in blocks.items()}

    special_tokens = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    # Sums with keys in every layer but the last, which attends to 256 tokens: the length has no limit, and the decode state
    # does not grow.
    config = SumAggConfig(
        vocab_size=len(tokenizer),
        hidden_size=arguments.hidden_size,
        num_hidden_layers=arguments.num_hidden_layers,
        num_attention_heads=arguments.num_attention_heads,
        **special_tokens,
    )
    model = AutoModelForCausalLM.from_config(config)
    model.generation_config = GenerationConfig(
        do_sample=True, temperature=0.7, top_p=0.9, max_new_tokens=arguments.max_new_tokens, **special_tokens
    )
    print(
        f"Text: {len(texts['train'])} files to train on, {len(texts['held-out'])} held out. Model: "
        f"{model.num_parameters():,} parameters, layers {', '.join(config.layer_types)}."
    )

    trainer = DecayTrainer(
        model=model,
        args=TrainingArguments(
            output_dir=arguments.output_dir,
            max_steps=arguments.steps,
            per_device_train_batch_size=arguments.batch_size,
            per_device_eval_batch_size=4 * arguments.batch_size,
            learning_rate=arguments.learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=0.1,
            weight_decay=0.1,
            logging_steps=0.1,
            save_strategy="no",
            report_to="none",
            dataloader_pin_memory=torch.accelerator.is_available(),
            seed=arguments.seed,
        ),
        train_dataset=datasets["train"],
        eval_dataset=datasets["held-out"],
        processing_class=tokenizer,
        data_collator=default_data_collator,
    )
    training = trainer.train().metrics
    cross_entropy = trainer.evaluate()["eval_loss"]
    # `Trainer` turned it off.
    model.config.use_cache = True
    trainer.save_model()
    # Paths of this machine are in it, and nothing reads it.
    (Path(arguments.output_dir) / "training_args.bin").unlink()

    model = AutoModelForCausalLM.from_pretrained(arguments.output_dir)
    tokenizer = AutoTokenizer.from_pretrained(arguments.output_dir)
    print(f"\nReloaded from {arguments.output_dir}. The model writes, token by token drawn at random:\n")
    inputs = tokenizer(arguments.prompt, return_tensors="pt")
    set_seed(arguments.seed)
    start = time.perf_counter()
    generated = model.generate(**inputs, streamer=TextStreamer(tokenizer, skip_special_tokens=True))[0]
    decoding_speed = (len(generated) - inputs["input_ids"].shape[1]) / (time.perf_counter() - start)

    # Both predict every token of a held-out block but its first.
    predicted = blocks["held-out"][:, 1:].flatten()
    counts = 1 + np.bincount(blocks["train"].flatten(), minlength=len(tokenizer))
    unigram = -np.log(counts / counts.sum())[predicted].mean()
    # Byte-level BPE writes each byte as one character.
    text = tokenizer.convert_ids_to_tokens(predicted.tolist(), skip_special_tokens=True)
    tokens_per_byte = len(predicted) / sum(map(len, text))
    print(f"\nPerplexity on {len(blocks['held-out'])} held-out sequences    per token   per byte")
    for name, nats in (("this model", cross_entropy), ("unigram frequencies", unigram)):
        print(f"  {name:36}{math.exp(nats):12.2f}{math.exp(nats * tokens_per_byte):11.3f}")
    if cross_entropy >= unigram:
        print("  The model is no better than the frequencies: train it for more steps.")

    state, _ = decode_state_size(model)
    attention = 2 * config.num_hidden_layers * config.hidden_size * model.dtype.itemsize
    print(
        f"\nDecode state of one sequence: {state:,} bytes, however long the text. Attention in every layer would "
        f"hold {attention:,} bytes a token, {1024 * attention:,} after 1,024 tokens."
    )
    training_speed = training["train_samples_per_second"] * arguments.context_length
    print(f"Training {training_speed:,.0f} tokens/s, decoding {decoding_speed:,.0f} tokens/s.")

    folder = Path(arguments.output_dir)
    source = "Python's standard library" if arguments.train_files is None else "text files"
    baselines = {"unigram frequencies": unigram}
    plot_training(trainer.state.log_history, folder / "training.png", baselines=baselines, loss_unit="nats a token")
    print(f"\nThe check of {folder}, where this package is not installed:")
    save_model_card(
        trainer.accelerator.unwrap_model(trainer.model),
        folder,
        dataset_name=f"{source}, {len(texts['train']):,} files",
        evaluated_on=f"{len(texts['held-out']):,} other files",
        num_examples=len(blocks["held-out"]),
        metrics={"perplexity": math.exp(cross_entropy)},
        baselines={name: {"perplexity": math.exp(nats)} for name, nats in baselines.items()},
        hyperparameters={
            name: getattr(arguments, name) for name in ("learning_rate", "batch_size", "context_length", "seed")
        },
        steps=arguments.steps,
        prompt=arguments.prompt,
        sample=tokenizer.decode(generated, skip_special_tokens=True),
    )
    print(
        f"\nSaved to {folder}: the model with its tokenizer and its card (README.md), and the losses by step "
        f"({folder / 'training.png'}).\nNext: python -m modeling_sumagg check {folder}"
    )


if __name__ == "__main__":
    run(main)
