"""How many calls of the model do assisted decoding and prompt lookup save, and do they change a token?

    python examples/benchmarks/assisted_decoding.py --model DIR --text FILE [--assistant_model DIR]

Prompts are cut at random places out of `--text`. Every prompt is continued three times: greedily, with prompt lookup, and
with an assistant. Without `--assistant_model` the model assists itself, which shows the most that an assistant can save
in calls (not in time).
"""

import argparse
import copy
import random
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import modeling_sumagg  # noqa: F401  (registers the models)


def count_calls(model: PreTrainedModel, prompt: list[int], **options) -> tuple[list[int], int]:
    """The tokens that `generate` adds to a prompt, and the forward passes of the model that it took."""
    calls = 0

    def count(*_) -> None:
        nonlocal calls
        calls += 1

    handle = model.register_forward_hook(count)
    try:
        generated = model.generate(torch.tensor([prompt], device=model.device), do_sample=False, **options)
    finally:
        handle.remove()
    return generated[0, len(prompt) :].tolist(), calls


def compare(
    model: PreTrainedModel,
    prompts: list[list[int]],
    modes: dict[str, dict],
    max_new_tokens: int,
) -> dict[str, dict[str, int]]:
    """
    Continue each prompt greedily and in every mode.

    Args:
        model: the model whose calls are counted.
        prompts: token ids.
        modes: the options of `generate` by the name of the mode.
        max_new_tokens: length of the continuations.

    Returns:
        By mode, with `"greedy"` first: `calls` of the model, `tokens` generated and, of them, `differing` tokens.
    """
    results = {name: {"calls": 0, "tokens": 0, "differing": 0} for name in ("greedy", *modes)}
    for prompt in prompts:
        expected, calls = count_calls(model, prompt, max_new_tokens=max_new_tokens)
        results["greedy"]["calls"] += calls
        results["greedy"]["tokens"] += len(expected)
        for name, options in modes.items():
            tokens, calls = count_calls(model, prompt, max_new_tokens=max_new_tokens, **options)
            results[name]["calls"] += calls
            results[name]["tokens"] += len(tokens)
            results[name]["differing"] += sum(a != b for a, b in zip(tokens, expected, strict=False))
            results[name]["differing"] += abs(len(tokens) - len(expected))
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--assistant_model", help="with the same tokenizer")
    parser.add_argument("--text", type=Path, required=True, help="a text file to cut the prompts from")
    parser.add_argument("--num_prompts", type=int, default=100)
    parser.add_argument("--prompt_tokens", type=int, default=64)
    parser.add_argument("--max_new_tokens", type=int, default=64)
    parser.add_argument("--prompt_lookup_num_tokens", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()

    model = AutoModelForCausalLM.from_pretrained(arguments.model).eval()
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    ids = tokenizer(arguments.text.read_text(encoding="utf-8"))["input_ids"]
    if len(ids) <= arguments.prompt_tokens:
        raise ValueError(
            f"{arguments.text} has {len(ids)} tokens, a prompt {arguments.prompt_tokens}: give a longer text."
        )
    draw = random.Random(arguments.seed)
    starts = [draw.randrange(len(ids) - arguments.prompt_tokens) for _ in range(arguments.num_prompts)]
    prompts = [ids[start : start + arguments.prompt_tokens] for start in starts]
    # A copy, so that the calls of the assistant are not counted.
    assistant = copy.deepcopy(model)
    if arguments.assistant_model is not None:
        assistant = AutoModelForCausalLM.from_pretrained(arguments.assistant_model).eval()
    modes = {
        "prompt lookup": {"prompt_lookup_num_tokens": arguments.prompt_lookup_num_tokens},
        "assistant": {"assistant_model": assistant},
    }
    results = compare(model, prompts, modes, arguments.max_new_tokens)

    print(f"{len(prompts)} prompts of {arguments.prompt_tokens} tokens")
    print("| mode | tokens | differing tokens | calls of the model | calls saved |\n|---|---|---|---|---|")
    for name, result in results.items():
        saved = 1 - result["calls"] / results["greedy"]["calls"]
        print(f"| {name} | {result['tokens']} | {result['differing']} | {result['calls']} | {saved:.1%} |")


if __name__ == "__main__":
    main()
