"""Train a small summation language model on real text, save it, reload it, and let it write. About five minutes.

Without arguments it needs no network: the text is the source code of Python's standard library.

    python examples/quickstart.py
    python examples/quickstart.py --train_files book1.txt book2.txt --held_out_files book3.txt --steps 2000
"""

import math
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from datasets import Dataset
from embedded_data import standard_library_sources
from training_utils import (
    WeightDecayTrainer,
    check_reload,
    concatenated_blocks,
    plot_training,
    train_tokenizer,
    unigram_cross_entropy,
)
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    HfArgumentParser,
    PreTrainedTokenizerFast,
    TextStreamer,
    TrainingArguments,
    default_data_collator,
    set_seed,
)

from modeling_sumagg import SumAggConfig
from modeling_sumagg.hub import decode_state_size


@dataclass
class QuickstartArguments:
    output_dir: str = field(default="runs/quickstart", metadata={"help": "Where the model and the plot go."})
    steps: int = field(default=1800, metadata={"help": "Training steps."})
    batch_size: int = field(default=4, metadata={"help": "Sequences a step."})
    context_length: int = field(default=256, metadata={"help": "Tokens of a training sequence."})
    vocab_size: int = field(default=4096, metadata={"help": "Tokens of the vocabulary to learn."})
    hidden_size: int = field(default=128, metadata={"help": "Width of the model."})
    num_hidden_layers: int = field(default=4, metadata={"help": "Blocks: all sum but the last, which attends."})
    num_attention_heads: int = field(default=4, metadata={"help": "Heads of the attention block."})
    learning_rate: float = field(default=2e-3, metadata={"help": "Highest learning rate, after the warm-up."})
    train_files: list[str] | None = field(default=None, metadata={"help": "UTF-8 text files of your own."})
    held_out_files: list[str] | None = field(default=None, metadata={"help": "Text files to evaluate on."})
    prompt: str = field(default="def read(", metadata={"help": "The text to continue after training."})
    max_new_tokens: int = field(default=120, metadata={"help": "Tokens to write after the prompt."})
    seed: int = field(default=0, metadata={"help": "Seed of the weights, the data order and the sampling."})

    def __post_init__(self):
        if (self.train_files is None) != (self.held_out_files is None):
            raise ValueError("Give both --train_files and --held_out_files, or neither.")


def load_texts(arguments: QuickstartArguments) -> tuple[list[str], list[str]]:
    """The training texts and the held-out ones, a file each."""
    if arguments.train_files is not None:
        files = (arguments.train_files, arguments.held_out_files)
        return tuple([Path(name).read_text(encoding="utf-8") for name in names] for names in files)
    sources = standard_library_sources()
    return list(sources["train"]["text"]), list(sources["test"]["text"])


def mean_token_bytes(tokenizer: PreTrainedTokenizerFast, token_ids: list[int]) -> float:
    """Mean bytes of text a token. Byte-level BPE writes a byte as one character; special tokens are no text."""
    tokens = tokenizer.convert_ids_to_tokens(token_ids)
    return sum(len(token) for token in tokens if token not in tokenizer.all_special_tokens) / len(tokens)


def main() -> None:
    (arguments,) = HfArgumentParser(
        QuickstartArguments, description=__doc__.split("\n\n")[0]
    ).parse_args_into_dataclasses()
    set_seed(arguments.seed)

    train_texts, held_out_texts = load_texts(arguments)
    print(f"Text: {len(train_texts)} files to train on, {len(held_out_texts)} held out.")
    tokenizer = train_tokenizer(train_texts, arguments.vocab_size)
    blocks = {}
    for name, texts in (("train", train_texts), ("held out", held_out_texts)):
        ids = tokenizer(texts)["input_ids"]
        blocks[name] = list(concatenated_blocks(ids, tokenizer.eos_token_id, arguments.context_length))
        if not blocks[name]:
            raise ValueError(f"The {name} text has fewer tokens than one context of {arguments.context_length}.")
    datasets = {name: Dataset.from_dict({"input_ids": ids, "labels": ids}) for name, ids in blocks.items()}

    config = SumAggConfig(
        vocab_size=len(tokenizer),
        hidden_size=arguments.hidden_size,
        num_hidden_layers=arguments.num_hidden_layers,
        num_attention_heads=arguments.num_attention_heads,
        position_embedding_type="sinusoidal",
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = AutoModelForCausalLM.from_config(config)
    model.generation_config = GenerationConfig(
        do_sample=True,
        temperature=0.7,
        top_p=0.9,
        max_new_tokens=arguments.max_new_tokens,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    print(f"Model: {model.num_parameters():,} parameters, layers {config.layer_types}.")

    trainer = WeightDecayTrainer(
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
        eval_dataset=datasets["held out"],
        processing_class=tokenizer,
        data_collator=default_data_collator,
    )
    training = trainer.train().metrics
    cross_entropy = trainer.evaluate()["eval_loss"]
    # Turned off for training.
    model.config.use_cache = True
    trainer.save_model()

    held_out = {"input_ids": torch.tensor(blocks["held out"][:1])}
    model = check_reload(AutoModelForCausalLM, trainer, held_out)
    tokenizer = AutoTokenizer.from_pretrained(arguments.output_dir)
    print(
        f"\nReloaded from {arguments.output_dir}: all weights and, up to rounding, the logits are identical. The model writes:\n"
    )
    inputs = tokenizer(arguments.prompt, return_tensors="pt")
    set_seed(arguments.seed)
    start = time.perf_counter()
    generated = model.generate(**inputs, streamer=TextStreamer(tokenizer))
    decoding_speed = (generated.shape[1] - inputs["input_ids"].shape[1]) / (time.perf_counter() - start)

    # Both see the same tokens: every token of a held-out block but its first.
    baseline = unigram_cross_entropy(blocks["train"], blocks["held out"], len(tokenizer))
    tokens_per_byte = 1 / mean_token_bytes(tokenizer, [token for block in blocks["held out"] for token in block[1:]])
    print(f"\nPerplexity on {len(blocks['held out'])} held-out sequences    per token   per byte")
    for name, nats in (("this model", cross_entropy), ("unigram frequencies", baseline)):
        print(f"  {name:36}{math.exp(nats):12.2f}{math.exp(nats * tokens_per_byte):11.3f}")
    if cross_entropy >= baseline:
        print("  The model is no better than the frequencies: train it for more steps.")

    length = arguments.context_length
    constant, per_token = decode_state_size(model)
    attention = 2 * config.num_hidden_layers * config.hidden_size * model.dtype.itemsize
    print("\nDecode state of one sequence, in bytes        summation   attention       total")
    for name, sums, keys_and_values in (
        ("this model", constant, per_token),
        ("attention in every layer", 0, attention),
    ):
        total = sums + length * keys_and_values
        print(f"  {name:36}{sums:16,}{length * keys_and_values:12,}{total:12,}  at {length} tokens")

    training_speed = training["train_samples_per_second"] * length
    print(f"\nTraining {training_speed:,.0f} tokens/s, decoding {decoding_speed:,.0f} tokens/s")

    plot_path = Path(arguments.output_dir) / "training.png"
    plot_training(trainer.state.log_history, "loss", {"unigram frequencies": baseline}, plot_path)
    print(f"Model, tokenizer and generation config: {arguments.output_dir}; losses: {plot_path}")


if __name__ == "__main__":
    main()
