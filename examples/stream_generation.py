"""Read a text without end, keep its constant-size state, and at any moment score it or write on.

    python quickstart.py
    tail -f log.txt | python stream_generation.py --model runs/quickstart --state state.safetensors --report_every 10000

Every `--report_every` tokens, on SIGUSR1 and at the end of the input, it prints a line: how many tokens it has read,
their perplexity, and how the model would go on. Ctrl-C saves the state; with `--resume` the next run goes on from it as if there had been no interruption:
a file is read from where the first run stopped, a pipe from what comes next.

The model needs a state of constant size and positions without end: no full attention, no learned positions. That of
quickstart.py has both.
"""

import argparse
import codecs
import copy
import json
import math
import os
import re
import select
import signal
import sys
import time
from pathlib import Path


# Threads that wait for each other sleep, and leave the processor to others: read when torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DynamicCache,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    set_seed,
)

import modeling_sumagg  # noqa: F401  (registers the models)
from modeling_sumagg.publishing.saved_states import cache_from_tensors, cache_to_tensors


# Tokens enter the state in blocks that are counted from the beginning of the stream, so that every rounding, and with
# it every later token, is the same however the text arrives.
BLOCK_TOKENS = 64
READ_BYTES = 1 << 16
# A word with the spaces before it: no byte-level BPE merges across the change from a non-space to a space. What has no
# such change for long is cut by length, so that little text ever waits.
WORD = re.compile(r"\s{1000}|\s{0,999}\S{1,1000}")


# A model that fits, in one line.
REMEDY = "`python quickstart.py` trains a model that has neither limit, for --model runs/quickstart."


def check_constant_state(config: PreTrainedConfig) -> None:
    """
    Raises:
        ValueError: the state of such a model grows with the text, or its positions end.
    """
    if config.model_type not in ("sumagg", "tost_text"):
        raise ValueError(f"A model of type {config.model_type!r} has no state of constant size. {REMEDY}")
    growing = [i for i, layer_type in enumerate(config.layer_types) if layer_type == "full_attention"]
    if growing:
        raise ValueError(
            f"Layers {growing} of the model attend to the whole text (`layer_types`): its state grows with every token. "
            f"{REMEDY}"
        )
    if config.position_embedding_type == "learned" or getattr(config, "use_membership_bias", False):
        table = "use_membership_bias=True" if config.position_embedding_type != "learned" else "learned positions"
        raise ValueError(
            f"The model has a table that ends after {config.max_position_embeddings} tokens ({table}). {REMEDY}"
        )


class TextStream:
    """
    The state of a text that arrives in pieces.

    Attributes:
        cache: the decode state after the blocks of tokens so far; `None` before the first.
        pending: the token ids that do not fill a block yet, at most `BLOCK_TOKENS` of them.
        held: the end of the text, which waits for the rest of its last word.
        num_bytes, num_tokens: what has been read and tokenized.
        loss, num_scored: the sum of the negative log probabilities of the tokens in blocks, and their number.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase):
        check_constant_state(model.config)
        self.model, self.tokenizer = model.eval(), tokenizer
        self.cache: DynamicCache | None = None
        self.pending: list[int] = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
        self.decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self.held = ""
        self.num_bytes = 0
        self.num_tokens = len(self.pending)
        self.loss, self.num_scored = 0.0, 0

    def feed(self, data: bytes, final: bool = False) -> None:
        """Read on; `final` says that the text ends here and its last word is whole."""
        self.num_bytes += len(data)
        self.held += self.decoder.decode(data, final)
        words = list(WORD.finditer(self.held))
        if not final and words:
            # The last one may go on.
            words.pop()
        end = words[-1].end() if words else 0
        pieces = [word.group() for word in words]
        if final and self.held[end:]:
            pieces.append(self.held[end:])
            end = len(self.held)
        self.held = self.held[end:]
        tokens = self._tokenize(pieces)
        self.num_tokens += len(tokens)
        self.pending += tokens
        while len(self.pending) > BLOCK_TOKENS:
            if self.cache is None:
                self.cache = DynamicCache(config=self.model.config)
            self.loss += self._loss(self.pending[: BLOCK_TOKENS + 1], self.cache)
            self.num_scored += BLOCK_TOKENS
            del self.pending[:BLOCK_TOKENS]

    def _tokenize(self, pieces: list[str]) -> list[int]:
        # Word by word: the tokens cannot depend on where the chunks ended.
        if not pieces:
            return []
        return sum(self.tokenizer(pieces, add_special_tokens=False)["input_ids"], [])

    @torch.no_grad()
    def _loss(self, tokens: list[int], cache: DynamicCache) -> float:
        """Feed all tokens but the last to the cache; the summed loss of all but the first."""
        ids = torch.tensor([tokens], device=self.model.device)
        logits = self.model(ids[:, :-1], past_key_values=cache).logits[0].float()
        return torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum").item()

    def _copy(self) -> DynamicCache:
        return DynamicCache(config=self.model.config) if self.cache is None else copy.deepcopy(self.cache)

    def perplexity(self) -> float:
        """Of every token so far but the first, which nothing predicts; `nan` before there is one."""
        loss, num_scored = self.loss, self.num_scored
        if len(self.pending) > 1:
            loss += self._loss(self.pending, self._copy())
            num_scored += len(self.pending) - 1
        return math.exp(loss / num_scored) if num_scored else math.nan

    def continuation(self, max_new_tokens: int, seed: int, **options) -> list[int]:
        """The tokens that the model writes next, the text held back included; the state stays as it is."""
        tokens = self.pending + self._tokenize([self.held] if self.held else [])
        if not tokens:
            return []
        cache = self._copy()
        past = int(cache.get_seq_length())
        set_seed(seed + self.num_tokens)
        generated = self.model.generate(
            torch.tensor([tokens], device=self.model.device),
            # No bytes are held for the mask of the text so far.
            attention_mask=torch.ones(1, 1, dtype=torch.bool, device=self.model.device).expand(1, past + len(tokens)),
            position_ids=torch.arange(past, past + len(tokens), device=self.model.device)[None],
            past_key_values=cache,
            max_new_tokens=max_new_tokens,
            **options,
        )
        return generated[0, len(tokens) :].tolist()

    def save(self, path: Path) -> None:
        """Write the state as safetensors, whole or not at all."""
        text = self.held.encode() + self.decoder.getstate()[0]
        tensors = {} if self.cache is None else {f"cache.{k}": v for k, v in cache_to_tensors(self.cache).items()}
        tensors["pending"] = torch.tensor(self.pending, dtype=torch.int64)
        tensors["held"] = torch.tensor(list(text), dtype=torch.uint8)
        tensors["loss"] = torch.tensor(self.loss, dtype=torch.float64)
        counts = {"num_bytes": self.num_bytes, "num_tokens": self.num_tokens, "num_scored": self.num_scored}
        temporary = path.with_name(path.name + ".tmp")
        save_file(tensors, temporary, metadata={"counts": json.dumps(counts)})
        os.replace(temporary, path)

    def load(self, path: Path) -> None:
        """Go on from what `save` wrote."""
        with safe_open(path, framework="pt", device=str(self.model.device)) as file:
            if "counts" not in (file.metadata() or {}):
                raise ValueError(f"{path} holds no state that this script saved.")
            counts = json.loads(file.metadata()["counts"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}
        cache = {k.removeprefix("cache."): v for k, v in tensors.items() if k.startswith("cache.")}
        self.cache = cache_from_tensors(cache, self.model.config) if cache else None
        self.pending, self.loss = tensors["pending"].tolist(), tensors["loss"].item()
        self.decoder.reset()
        self.held = self.decoder.decode(bytes(tensors["held"].tolist()))
        self.num_bytes, self.num_tokens, self.num_scored = (
            counts[name] for name in ("num_bytes", "num_tokens", "num_scored")
        )


class Signals:
    """Signals as flags, looked at between two chunks only, and a descriptor that becomes readable when one comes."""

    def __init__(self):
        self.stop = self.report = False
        self.readable, writable = os.pipe()
        os.set_blocking(writable, False)
        signal.set_wakeup_fd(writable, warn_on_full_buffer=False)
        signal.signal(signal.SIGINT, self._stop)
        signal.signal(signal.SIGUSR1, self._report)

    def _stop(self, *_) -> None:
        self.stop = True

    def _report(self, *_) -> None:
        self.report = True


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--model", required=True, help="a checkpoint: a folder or a name on the Hub")
    parser.add_argument("--input", type=Path, help="the file to read; standard input by default")
    parser.add_argument("--state", type=Path, required=True, help="the safetensors file that Ctrl-C writes")
    parser.add_argument("--resume", action="store_true", help="go on from --state")
    parser.add_argument("--chunk_bytes", type=int, default=READ_BYTES, help="the most bytes to read at once")
    parser.add_argument(
        "--report_every", type=int, default=0, help="tokens from one report to the next; 0: at the end"
    )
    parser.add_argument("--max_new_tokens", type=int, default=50, help="length of a continuation; 0: only score")
    parser.add_argument("--do_sample", action="store_true", help="sample the continuations; greedy by default")
    parser.add_argument("--json", action="store_true", help="reports for programs, with the ids of the continuation")
    parser.add_argument("--seed", type=int, default=0, help="seed of the sampling")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    signals = Signals()
    try:
        model = AutoModelForCausalLM.from_pretrained(arguments.model)
        stream = TextStream(model, AutoTokenizer.from_pretrained(arguments.model))
        source = sys.stdin.fileno() if arguments.input is None else os.open(arguments.input, os.O_RDONLY)
        if arguments.resume:
            stream.load(arguments.state)
            if arguments.input is not None:
                os.lseek(source, stream.num_bytes, os.SEEK_SET)
    except (OSError, ValueError, SafetensorError) as error:
        sys.exit(f"error: {' '.join(str(error).split())}")
    every = f"every {arguments.report_every:,} tokens and " if arguments.report_every else ""
    print(
        f"Reads {arguments.input or 'standard input'} and reports {every}at its end; Ctrl-C saves the state to "
        f"{arguments.state} and stops.",
        file=sys.stderr,
    )

    reported, began, began_at = stream.num_tokens, time.monotonic(), stream.num_tokens

    def report() -> None:
        nonlocal reported
        reported = stream.num_tokens
        tokens = []
        if arguments.max_new_tokens:
            tokens = stream.continuation(arguments.max_new_tokens, arguments.seed, do_sample=arguments.do_sample)
        text, perplexity = stream.tokenizer.decode(tokens, skip_special_tokens=True), stream.perplexity()
        if arguments.json:
            line = {"num_tokens": reported, "perplexity": perplexity, "tokens": tokens, "text": text}
            print(json.dumps(line), flush=True)
        else:
            text = " ".join(text.split())
            print(f"{reported:,} tokens, perplexity {perplexity:.4g}, and on: {text}", flush=True)

    def read_on(data: bytes) -> None:
        """Feed the stream, and stop for every report that becomes due: a byte is a token at the most."""
        while data:
            size = arguments.report_every - (stream.num_tokens - reported) if arguments.report_every else len(data)
            stream.feed(data[: max(size, 1)])
            data = data[max(size, 1) :]
            if arguments.report_every and stream.num_tokens - reported >= arguments.report_every:
                report()

    while not signals.stop:
        ready, _, _ = select.select([source, signals.readable], [], [])
        if signals.readable in ready:
            os.read(signals.readable, READ_BYTES)
        if signals.stop:
            break
        if source in ready:
            data = os.read(source, arguments.chunk_bytes)
            read_on(data)
            if not data:
                stream.feed(b"", final=True)
                report()
                break
        if signals.report:
            signals.report = False
            report()
    speed = (stream.num_tokens - began_at) / (time.monotonic() - began)
    stream.save(arguments.state)
    print(
        f"{stream.num_tokens:,} tokens, {speed:,.0f} a second. The state is in {arguments.state}: --resume goes on.",
        file=sys.stderr,
    )
    if signals.stop:
        sys.exit(130)


if __name__ == "__main__":
    main()
