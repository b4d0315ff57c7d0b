"""What do recurrent models do in each mode of `generate`? Prints a Markdown table; every cell is a run.

    python examples/benchmarks/generate_matrix.py

Tiny models with random weights. A cell says `exact` if the tokens are those of greedy decoding by a full forward pass,
without cache, of each sequence alone (or, where a mode draws or searches, those of the same mode without cache),
`wrong` if they are not, or the error.
"""

import copy
import inspect
from collections.abc import Callable

import torch
import transformers
from transformers import (
    AutoModelForCausalLM,
    Cache,
    CompileConfig,
    DynamicCache,
    Mamba2Config,
    PreTrainedModel,
    Qwen3NextConfig,
    RecurrentGemmaConfig,
    set_seed,
)

from modeling_sumagg import SumAggConfig, ToSTTextConfig


SIZES = {"vocab_size": 32, "hidden_size": 32, "num_hidden_layers": 4}
SPECIAL = {"bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0}
CONFIGS = {
    "Mamba2": Mamba2Config(
        **SIZES, **SPECIAL, state_size=8, head_dim=16, num_heads=4, n_groups=1, chunk_size=8, expand=2
    ),
    "Qwen3-Next": Qwen3NextConfig(
        **SIZES,
        **SPECIAL,
        intermediate_size=64,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=16,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
        linear_num_key_heads=2,
        linear_num_value_heads=2,
        num_experts=2,
        num_experts_per_tok=1,
        moe_intermediate_size=32,
        shared_expert_intermediate_size=32,
    ),
    "RecurrentGemma": RecurrentGemmaConfig(
        **SIZES,
        **SPECIAL,
        intermediate_size=64,
        num_attention_heads=2,
        num_key_value_heads=1,
        lru_width=32,
        attention_window_size=16,
    ),
    "SumAgg": SumAggConfig(**SIZES, **SPECIAL, num_attention_heads=2, max_position_embeddings=128),
    "SumAgg, sliding": SumAggConfig(
        **SIZES,
        **SPECIAL,
        num_attention_heads=2,
        layer_types=["summation", "summation", "summation", "sliding_attention"],
        sliding_window=4,
        position_embedding_type="sinusoidal",
    ),
    "ToST": ToSTTextConfig(**SIZES, **SPECIAL, num_attention_heads=2, max_position_embeddings=128),
}
NEW_TOKENS = 6
PROMPT = [5, 9, 2, 30, 7, 7, 5, 9]
SHORT = [3, 4, 11]


def build(config) -> PreTrainedModel:
    """A model whose every parameter matters."""
    set_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


@torch.no_grad()
def alone(model: PreTrainedModel, prompt: list[int]) -> list[int]:
    tokens = list(prompt)
    for _ in range(NEW_TOKENS):
        tokens.append(model(torch.tensor([tokens]), use_cache=False).logits[0, -1].argmax().item())
    return tokens[len(prompt) :]


def generate(model: PreTrainedModel, input_ids, attention_mask=None, **options) -> list[list[int]]:
    input_ids = torch.tensor(input_ids)
    if attention_mask is not None:
        attention_mask = torch.tensor(attention_mask)
    options = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "attention_mask": attention_mask, **options}
    return model.generate(input_ids, **options)[:, input_ids.shape[1] :].tolist()


def padded(side: str) -> tuple[list[list[int]], list[list[int]]]:
    fill = len(PROMPT) - len(SHORT)
    row, mask = SHORT + [13] * fill, [1] * len(SHORT) + [0] * fill
    return [PROMPT, row if side == "right" else row[::-1]], [
        [1] * len(PROMPT),
        mask if side == "right" else mask[::-1],
    ]


def greedy(model: PreTrainedModel) -> bool:
    return generate(model, [PROMPT]) == [alone(model, PROMPT)]


def without_cache(**options) -> Callable[[PreTrainedModel], bool]:
    def run(model: PreTrainedModel) -> bool:
        results = []
        for use_cache in (True, False):
            set_seed(0)
            results.append(generate(model, [PROMPT, PROMPT[::-1]], use_cache=use_cache, **options))
        return results[0] == results[1]

    return run


def left_padded(model: PreTrainedModel) -> bool:
    input_ids, mask = padded("left")
    return generate(model, input_ids, mask) == [alone(model, PROMPT), alone(model, SHORT[::-1])]


def right_padded(model: PreTrainedModel) -> bool:
    return generate(model, *padded("right")) == [alone(model, PROMPT), alone(model, SHORT)]


def padded_batch_of_one(model: PreTrainedModel) -> bool:
    return generate(model, [[13, 13, *PROMPT]], [[0, 0] + [1] * len(PROMPT)]) == [alone(model, PROMPT)]


def packed(model: PreTrainedModel) -> bool:
    position_ids = torch.tensor([[*range(len(PROMPT)), *range(len(SHORT))]])
    return generate(model, [PROMPT + SHORT], position_ids=position_ids) == [alone(model, SHORT)]


def with_options(**options) -> Callable[[PreTrainedModel], bool]:
    return lambda model: generate(model, [PROMPT], **options) == [alone(model, PROMPT)]


def embeddings(model: PreTrainedModel) -> bool:
    inputs_embeds = model.get_input_embeddings()(torch.tensor([PROMPT]))
    generated = model.generate(inputs_embeds=inputs_embeds, max_new_tokens=NEW_TOKENS, do_sample=False)
    return generated.tolist() == [alone(model, PROMPT)]


def assisted(**options) -> Callable[[PreTrainedModel], bool]:
    return lambda model: with_options(assistant_model=copy.deepcopy(model), **options)(model)


def compiled(model: PreTrainedModel) -> bool:
    compile_config = CompileConfig(fullgraph=True, mode=None, backend="aot_eager")
    compile_config._compile_all_devices = True
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    exact = with_options(cache_implementation="static", compile_config=compile_config)(model)
    num_graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    if num_graphs != 1:
        raise RuntimeError(f"compiled to {num_graphs} graphs")
    return exact


def cache_name(model: PreTrainedModel) -> str:
    """What the model calls its decode state: `cache` from transformers 5.24 on."""
    names = inspect.signature(model.forward).parameters
    return next(name for name in ("cache", "cache_params", "past_key_values") if name in names)


def goes_on(model: PreTrainedModel, rows: list[list[int]], mask: list[list[int]], cache, past: int) -> bool:
    """Whether `generate` continues rows of which a cache has seen `past` columns, given all the ids or the new ones."""
    histories = [
        [token for token, real in zip(row, real, strict=True) if real] for row, real in zip(rows, mask, strict=True)
    ]
    expected = [alone(model, history) for history in histories]
    return any(
        generate(model, ids, mask, **{cache_name(model): copy.deepcopy(cache)}) == expected
        for ids in (rows, [row[past:] for row in rows])
    )


def first_turn(model: PreTrainedModel, input_ids: list[list[int]]):
    output = model.generate(
        torch.tensor(input_ids), max_new_tokens=NEW_TOKENS, do_sample=False, return_dict_in_generate=True
    )
    return output.sequences.tolist(), next(value for value in output.values() if isinstance(value, Cache))


def next_turn(model: PreTrainedModel) -> bool:
    sequences, cache = first_turn(model, [PROMPT])
    history = sequences[0] + SHORT
    return goes_on(model, [history], [[1] * len(history)], cache, len(sequences[0]) - 1)


def padded_next_turn(model: PreTrainedModel) -> bool:
    sequences, cache = first_turn(model, [PROMPT, PROMPT[::-1]])
    rows = [sequences[0] + SHORT, [*sequences[1], 13, 13, 8]]
    past = [1] * len(sequences[0])
    return goes_on(model, rows, [[*past, 1, 1, 1], [*past, 0, 0, 1]], cache, len(past) - 1)


@torch.no_grad()
def copied_cache(model: PreTrainedModel) -> bool:
    cache = DynamicCache(config=model.config)
    model(torch.tensor([PROMPT]), use_cache=True, **{cache_name(model): cache})
    histories = [PROMPT + SHORT, PROMPT + SHORT[::-1]]
    return all(goes_on(model, [history], [[1] * len(history)], cache, len(PROMPT)) for history in histories)


@torch.no_grad()
def rollback(model: PreTrainedModel) -> bool:
    cache = DynamicCache(config=model.config)
    name = cache_name(model)
    model(torch.tensor([PROMPT]), use_cache=True, **{name: cache})
    cache.activate_past_recording()
    model(torch.tensor([SHORT]), use_cache=True, **{name: cache})
    cache.crop(-2)
    logits = model(torch.tensor([[8]]), use_cache=True, **{name: cache}).logits[0, -1]
    expected = model(torch.tensor([[*PROMPT, SHORT[0], 8]]), use_cache=False).logits[0, -1]
    return torch.allclose(logits, expected, rtol=1e-4, atol=1e-4)


MODES: dict[str, Callable[[PreTrainedModel], bool]] = {
    "greedy": greedy,
    "sampling": without_cache(do_sample=True),
    "beam search": without_cache(num_beams=3),
    "beam sampling": without_cache(num_beams=3, do_sample=True),
    "several return sequences": without_cache(num_return_sequences=3, do_sample=True),
    "`inputs_embeds` prompt": embeddings,
    "left-padded batch": left_padded,
    "right-padded batch": right_padded,
    "padded batch of one": padded_batch_of_one,
    "packed prompts (`position_ids`)": packed,
    "`prefill_chunk_size`": with_options(prefill_chunk_size=3),
    "`prefill_chunk_size`, static cache": with_options(prefill_chunk_size=3, cache_implementation="static"),
    "`cache_implementation='static'`": with_options(cache_implementation="static"),
    "static and compiled, one graph": compiled,
    "next turn from the returned cache": next_turn,
    "next turn with padding in it": padded_next_turn,
    "one prefilled cache, copied": copied_cache,
    "`crop` after several tokens": rollback,
    "`assistant_model`": assisted(),
    "`assistant_model`, static cache": assisted(cache_implementation="static"),
    "`prompt_lookup_num_tokens`": with_options(prompt_lookup_num_tokens=3),
    "`prompt_lookup_num_tokens`, static cache": with_options(
        prompt_lookup_num_tokens=3, cache_implementation="static"
    ),
}


def cell(mode: Callable[[PreTrainedModel], bool], model: PreTrainedModel) -> str:
    try:
        return "exact" if mode(model) else "**wrong**"
    except Exception as error:  # Whatever a model raises in a mode is what the table is to tell.
        message = " ".join(str(error).split()).replace("|", "/")
        return f"{type(error).__name__}: {message[:90]}"


def main() -> None:
    transformers.logging.set_verbosity_error()
    models = {name: build(config) for name, config in CONFIGS.items()}
    print(f"transformers {transformers.__version__}, PyTorch {torch.__version__}, CPU, float32\n")
    print(f"| mode | {' | '.join(models)} |\n|{'---|' * (len(models) + 1)}")
    for name, mode in MODES.items():
        print(f"| {name} | {' | '.join(cell(mode, model) for model in models.values())} |", flush=True)


if __name__ == "__main__":
    main()
