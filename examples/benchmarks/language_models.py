"""Prefill, decoding or a training step of language models over the length of the sequence.

    python examples/benchmarks/language_models.py --work prefill --output_dir prefill
    python examples/benchmarks/language_models.py --work decode --output_dir decode
    python examples/benchmarks/language_models.py --work training --output_dir training

Summation aggregation and the Token Statistics Transformer beside GPT-2, Llama, Mamba2 and RWKV of transformers, of the
same width, depth and vocabulary, with random weights. The floor is the matrix products of our models and nothing else.
"""

import dataclasses
import functools
import inspect
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from benchmark_utils import FLOOR, BenchmarkArguments, Row, benchmark, compiled, tensor_bytes, write_results
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    Cache,
    DynamicCache,
    GPT2Config,
    HfArgumentParser,
    LlamaConfig,
    Mamba2Config,
    PreTrainedConfig,
    PreTrainedModel,
    RwkvConfig,
    StaticCache,
)
from transformers.pytorch_utils import Conv1D
from transformers.utils import ModelOutput

from modeling_sumagg import SumAggConfig, ToSTTextConfig


BASELINE = "GPT-2"
LENGTHS = {
    "prefill": [512, 2048, 8192, 32768],
    "decode": [16, 1024, 4096, 32768, 131072],
    "training": [256, 1024, 4096, 8192],
}
TITLES = {
    "prefill": "Prefill: logits of the last token",
    "decode": "Decoding: one token after a context",
    "training": "Training step: forward, backward and AdamW",
}
SIZE_NAMES = {"prefill": "tokens", "decode": "tokens of context", "training": "tokens"}
CHUNK_SIZE = 512  # a longer context is read in parts, so that peak memory is that of decoding
STEPS = 10  # tokens decoded in one timed run


@dataclass
class LanguageModelArguments(BenchmarkArguments):
    work: str = field(default="prefill", metadata={"help": '"prefill", "decode" or "training".'})
    lengths: list[int] | None = field(default=None, metadata={"help": "Tokens; by default several for each work."})
    models: list[str] | None = field(default=None, metadata={"help": "The models by name; by default all."})
    batch_size: int = field(default=1, metadata={"help": "Sequences at a time."})
    prefill_chunk_size: int | None = field(
        default=None,
        metadata={"help": "Read a prompt in pieces of so many tokens, as `generate` does; Mamba2 and RWKV cannot."},
    )
    hidden_size: int = 768
    num_hidden_layers: int = 4
    num_attention_heads: int = 12
    vocab_size: int = 8192
    sliding_window: int = 256
    fuse_linear_cross_entropy: bool = field(
        default=False, metadata={"help": "Train our models without holding their logits, which the others cannot."}
    )

    def __post_init__(self):
        super().__post_init__()
        if self.work not in LENGTHS:
            raise ValueError(f"`work` must be one of {list(LENGTHS)}, got {self.work!r}.")
        self.lengths = self.lengths or LENGTHS[self.work]
        if min(self.lengths) < 2:
            raise ValueError(f"`lengths` must be at least 2, got {self.lengths}.")
        if self.batch_size < 1 or (self.prefill_chunk_size or 1) < 1:
            raise ValueError(
                f"`batch_size` and `prefill_chunk_size` must be at least 1, got {self.batch_size} and "
                f"{self.prefill_chunk_size}."
            )
        known = list(configurations(self, 2))
        known += [FLOOR + name for name in known if name in FLOORS] if self.work != "decode" else []
        unknown = set(self.models or ()) - set(known)
        if unknown:
            raise ValueError(f"`models` must be among {known}, got {sorted(unknown)}.")
        self.models = self.models or known


FLOORS = ("SumAgg", "ToST")


def configurations(arguments: LanguageModelArguments, max_length: int) -> dict[str, PreTrainedConfig]:
    """Every model by its name, with positions for `max_length` tokens."""
    width, depth = arguments.hidden_size, arguments.num_hidden_layers
    tokens = {"vocab_size": arguments.vocab_size, "bos_token_id": 0, "eos_token_id": 0}
    size = {"hidden_size": width, "num_hidden_layers": depth, "num_attention_heads": arguments.num_attention_heads}
    size |= {"max_position_embeddings": max_length} | tokens
    # The mixers of `presets/sumagg-small.json` but with a window of 64, those without keys, and the sums of 0.1, of as many parameters: feed-forward
    # layers are 4 times as wide as the model, or gated and 8/3 times, or 2 times beside keys.
    ours = size | {"fuse_linear_cross_entropy": arguments.fuse_linear_cross_entropy}
    lower = ["summation"] * (depth - 1)
    pure = {"layer_types": [*lower, "summation"]}
    group = math.gcd(width, 128)
    keyed = ours | {"intermediate_size": group * round(2 * width / group)}
    ours = ours | {"sum_state_size": None}
    return {
        "SumAgg, keys, window of 64 last": SumAggConfig(**keyed, sliding_window=64),
        "SumAgg, keys": SumAggConfig(**keyed, **pure),
        "SumAgg": SumAggConfig(**ours, **pure),
        "SumAgg, sliding window last": SumAggConfig(
            **ours, layer_types=[*lower, "sliding_attention"], sliding_window=arguments.sliding_window
        ),
        "SumAgg, full attention last": SumAggConfig(**ours, layer_types=[*lower, "full_attention"]),
        "SumAgg, plain sums": SumAggConfig(**{**ours, **pure, **SumAggConfig.values_of_0_1}),
        "SumAgg, plain sums, full attention last": SumAggConfig(
            **{**ours, "layer_types": [*lower, "full_attention"], **SumAggConfig.values_of_0_1}
        ),
        "ToST": ToSTTextConfig(**{name: value for name, value in ours.items() if name != "sum_state_size"}),
        "GPT-2": GPT2Config(
            n_embd=width, n_layer=depth, n_head=arguments.num_attention_heads, n_positions=max_length, **tokens
        ),
        "Llama": LlamaConfig(**size, intermediate_size=8 * round(width / 3)),
        "Mamba2": Mamba2Config(
            hidden_size=width, num_hidden_layers=depth, head_dim=64, num_heads=2 * width // 64, n_groups=1, **tokens
        ),
        "RWKV": RwkvConfig(
            hidden_size=width,
            num_hidden_layers=depth,
            intermediate_size=4 * width,
            context_length=max_length,
            **tokens,
        ),
    }


def build_model(arguments: LanguageModelArguments, name: str, max_length: int) -> PreTrainedModel:
    """The model of this name, ready for the work."""
    config = configurations(arguments, max_length)[name]
    dtype = getattr(torch, arguments.dtype)
    with torch.device(arguments.device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.train(arguments.work == "training")
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    if arguments.compile:
        model.forward = compiled(model.forward)
    return model


def random_tokens(arguments: LanguageModelArguments, length: int) -> torch.Tensor:
    return torch.randint(arguments.vocab_size, (arguments.batch_size, length), device=arguments.device)


def linear_shapes(model: PreTrainedModel, tokens: int, last_rows: int) -> Iterator[tuple[int, int, int]]:
    """Rows, inputs and outputs of every linear layer over `tokens`; of the output layer `last_rows`."""
    for module in model.modules():
        if isinstance(module, (nn.Linear, Conv1D)):
            inputs, outputs = module.weight.shape if isinstance(module, Conv1D) else module.weight.shape[::-1]
            yield last_rows if module is model.get_output_embeddings() else tokens, inputs, outputs


def matrix_products(model: PreTrainedModel, batch_size: int, length: int, training: bool) -> Callable[[], None]:
    """The matrix products of the linear layers, with nothing between them and on memory that is there already."""

    # One tensor for all of a role and a shape: with one for each layer, little memory would be left for the models.
    @functools.cache
    def tensor(role: str, *shape: int) -> torch.Tensor:
        return torch.randn(shape, dtype=model.dtype, device=model.device)

    tokens = batch_size * length
    layers = list(linear_shapes(model, tokens, last_rows=tokens if training else batch_size))
    weights = [tensor(f"weight of {i}", outputs, inputs) for i, (_, inputs, outputs) in enumerate(layers)]

    def run() -> None:
        for weight, (rows, inputs, outputs) in zip(weights, layers, strict=True):
            torch.mm(tensor("input", rows, inputs), weight.T, out=tensor("output", rows, outputs))
        if training:
            for weight, (rows, inputs, outputs) in zip(weights, layers, strict=True):
                grad_output = tensor("output", rows, outputs)
                torch.mm(grad_output.T, tensor("input", rows, inputs), out=tensor("grad of weight", outputs, inputs))
                torch.mm(grad_output, weight, out=tensor("grad of input", rows, inputs))

    return run


def prefill(model: PreTrainedModel, input_ids: torch.Tensor, chunk_size: int | None = None) -> object:
    """Read a sequence into a decode state, as `generate` does."""
    with torch.inference_mode():
        if model.config.model_type in ("mamba2", "rwkv"):
            # They compute the logits of all tokens, or none, and read a prompt at once.
            return model(input_ids=input_ids, use_cache=True)
        state: dict[str, object] = {}
        for chunk in input_ids.split(chunk_size or input_ids.shape[1], dim=1):
            output = model(input_ids=chunk, use_cache=True, logits_to_keep=1, **state)
            state = decode_state(output)
        return output


def decode_state(output: ModelOutput) -> dict[str, object]:
    """The decode state that a forward pass returned, under the name that `forward` has for it."""
    (name,) = {"cache", "past_key_values", "cache_params", "state"} & set(output.keys())
    return {name: output[name]}


def training_step(model: PreTrainedModel, input_ids: torch.Tensor, optimizer: torch.optim.Optimizer) -> None:
    model(input_ids=input_ids, labels=input_ids, use_cache=False).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


class Decoder:
    """Decodes greedily, token after token, after a context of `length` tokens and up to `max_length`."""

    def __init__(
        self, model: PreTrainedModel, length: int, max_length: int, static: bool = False, batch_size: int = 1
    ):
        self.model = model
        self.token = torch.zeros(batch_size, 1, dtype=torch.long, device=model.device)
        self.state: dict[str, object] = {}
        if model.config.model_type in ("mamba2", "rwkv"):
            length = 16  # the state is of constant size, and no position is in it
        else:
            cache = (
                StaticCache(config=model.config, max_cache_len=max_length)
                if static
                else DynamicCache(config=model.config)
            )
            names = inspect.signature(model.forward).parameters
            self.state["cache" if "cache" in names else "past_key_values"] = cache
        with torch.inference_mode():
            if model.config.model_type in ("gpt2", "llama"):
                # What decoding costs does not depend on the keys, and reading a long context would take minutes.
                fill_with_random_keys(cache, model, batch_size, length)
            else:
                for start in range(0, length, CHUNK_SIZE):
                    self._step(self.token.expand(-1, min(CHUNK_SIZE, length - start)))

    def _step(self, input_ids: torch.Tensor) -> torch.Tensor:
        """The next token."""
        output = self.model(input_ids=input_ids, use_cache=True, **self.state)
        self.state = decode_state(output)
        return output.logits[:, -1:].argmax(-1)

    def run(self) -> None:
        with torch.inference_mode():
            for _ in range(STEPS):
                self.token = self._step(self.token)


def state_bytes(arguments: LanguageModelArguments, row: Row) -> int:
    """The decode state after a context, in bytes."""
    model = build_model(arguments, row.case, row.size)
    return tensor_bytes(Decoder(model, row.size, row.size, batch_size=arguments.batch_size).state)


def fill_with_random_keys(cache: Cache, model: PreTrainedModel, batch_size: int, length: int) -> None:
    config = model.config
    heads, width = config.num_attention_heads, config.hidden_size // config.num_attention_heads
    for layer in range(config.num_hidden_layers):
        keys, values = torch.randn(2, batch_size, heads, length, width, dtype=model.dtype, device=model.device)
        cache.update(keys, values, layer)


def prepare_run(arguments: LanguageModelArguments, name: str, length: int) -> Callable[[], object]:
    """What to time of one model."""
    # Decoding goes on behind the context.
    max_length = length + STEPS * (arguments.repetitions + arguments.warmup) if arguments.work == "decode" else length
    model = build_model(arguments, name.removeprefix(FLOOR), max_length)
    if name.startswith(FLOOR):
        return matrix_products(model, arguments.batch_size, length, arguments.work == "training")
    if arguments.work == "decode":
        return Decoder(model, length, max_length, arguments.compile, arguments.batch_size).run
    input_ids = random_tokens(arguments, length)
    if arguments.work == "prefill":
        return functools.partial(prefill, model, input_ids, arguments.prefill_chunk_size)
    return functools.partial(training_step, model, input_ids, torch.optim.AdamW(model.parameters()))


def main() -> None:
    (arguments,) = HfArgumentParser(LanguageModelArguments).parse_args_into_dataclasses()
    arguments.set_up()
    if arguments.work == "decode":
        # cuDNN's attention is planned for every length of the keys anew: 50 ms a token with PyTorch 2.11 on an H200.
        torch.backends.cuda.enable_cudnn_sdp(False)

    rows = benchmark(arguments, arguments.lengths, arguments.models, prepare_run, grows=arguments.work != "decode")
    if arguments.work == "decode":
        rows = [
            dataclasses.replace(
                row, seconds=[seconds / STEPS for seconds in row.seconds], state_bytes=state_bytes(arguments, row)
            )
            for row in rows
        ]
    sequences = "one sequence" if arguments.batch_size == 1 else f"{arguments.batch_size} sequences"
    title = (
        f"{TITLES[arguments.work]}; {sequences}, width {arguments.hidden_size}, "
        f"{arguments.num_hidden_layers} layers, {arguments.vocab_size:,} tokens in the vocabulary"
    )
    if arguments.prefill_chunk_size is not None:
        title += f", in pieces of {arguments.prefill_chunk_size:,} tokens"
    if arguments.fuse_linear_cross_entropy:
        title += ", loss of our models fused"
    if arguments.compile:
        title += ", compiled"
    write_results(arguments, arguments.work, title, SIZE_NAMES[arguments.work], BASELINE, rows)


if __name__ == "__main__":
    main()
