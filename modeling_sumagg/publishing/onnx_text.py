"""
Write text with an exported language model. It needs numpy, onnxruntime and tokenizers, and neither torch nor
transformers:

    python run.py "Once upon a time" --max_new_tokens 50

The state of the text is a dictionary of arrays of constant size. Kept and put back, it continues the text.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from onnxruntime import InferenceSession


State = dict[str, np.ndarray]


class TextModel:
    """
    The graphs of a folder that `python -m modeling_sumagg export` wrote.

    Args:
        folder (`str` or `Path`): the folder.

    Attributes:
        manifest (`dict`): the names, types and shapes of the state, the limits, and how tokens are chosen.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.manifest = json.loads((self.folder / "manifest.json").read_text(encoding="utf-8"))
        self.decode_step, self.prefill = (
            InferenceSession(self.folder / name) for name in ("decode.onnx", "prefill.onnx")
        )

    def empty_state(self) -> State:
        """The state of no tokens: zeros."""
        return {part["name"]: np.zeros(part["shape"], part["dtype"]) for part in self.manifest["state"]}

    def read(self, tokens: list[int], state: State) -> tuple[np.ndarray, State]:
        """
        Read tokens after those that the state has seen, in segments.

        Returns:
            `tuple`: the logits after the last token, float32 `[V]`, and the state after it.

        Raises:
            `ValueError`: there are no tokens, or more than the model has positions or columns for.
        """
        if not tokens:
            raise ValueError("There are no tokens to read: pass at least one.")
        limit, seen = self.manifest["max_length"], int(state[self.manifest["length"]])
        if limit is not None and seen + len(tokens) > limit:
            raise ValueError(f"The exported model reads {limit} tokens at most, got {seen + len(tokens)}.")
        length = self.manifest["segment_length"]
        for start in range(0, len(tokens), length):
            segment = tokens[start : start + length]
            session = self.decode_step if len(segment) == 1 else self.prefill
            logits, *after = session.run(None, {"input_ids": np.array([segment]), **state})
            state = dict(zip(state, after, strict=True))
        return logits[0], state

    def write(self, tokens: list[int], state: State | None = None, seed: int = 0) -> Iterator[tuple[int, State]]:
        """Read the tokens, then choose one token after another, as the folder's settings say: each, and the state before it."""
        random, text = np.random.default_rng(seed), list(tokens)
        logits, state = self.read(tokens, state or self.empty_state())
        while True:
            token = int(random.choice(len(logits), p=self.probabilities(logits, text)))
            yield token, state
            if token in self.manifest["eos_token_ids"]:
                return
            text.append(token)
            logits, state = self.read([token], state)

    def probabilities(self, logits: np.ndarray, text: list[int]) -> np.ndarray:
        """The probabilities `[V]` of the next token after a text by its logits `[V]`, in the order of `generate`."""
        settings, logits = self.manifest["generation"], logits.astype(np.float64)
        seen, penalty = np.unique(text), settings["repetition_penalty"]
        logits[seen] = np.where(logits[seen] < 0, logits[seen] * penalty, logits[seen] / penalty)
        if not settings["do_sample"]:
            return (np.arange(len(logits)) == logits.argmax()).astype(np.float64)
        order = (-logits).argsort(kind="stable")[: settings["top_k"] or None]
        weights = np.exp((logits[order] - logits[order[0]]) / settings["temperature"])
        weights /= weights.sum()
        weights[weights.cumsum() - weights >= settings["top_p"]] = 0
        probabilities = np.zeros_like(logits)
        probabilities[order] = weights / weights.sum()
        return probabilities


def main() -> None:
    from tokenizers import Tokenizer

    folder = Path(__file__).parent
    model, tokenizer = TextModel(folder), Tokenizer.from_file(str(folder / "tokenizer.json"))
    parser = argparse.ArgumentParser(description=__doc__.strip().partition("\n")[0])
    parser.add_argument("prompt")
    parser.add_argument("--max_new_tokens", type=int, default=model.manifest["generation"]["max_new_tokens"])
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    tokens = tokenizer.encode(arguments.prompt).ids
    for count, (token, _) in enumerate(model.write(list(tokens), seed=arguments.seed), 1):
        tokens.append(token)
        if count == arguments.max_new_tokens:
            break
    print(tokenizer.decode(tokens))


if __name__ == "__main__":
    main()
