"""States after prefixes of tokens, so that `generate` reads of a prompt only the tokens that no stored state has seen."""

import hashlib
import inspect
import json
import os
import re
import threading
import time
from collections import OrderedDict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import transformers
from safetensors import SafetensorError
from transformers import Cache, GenerationConfig, PreTrainedModel, StoppingCriteria, StoppingCriteriaList
from transformers.utils import ModelOutput, logging

from ..common.compatibility import CACHE_NAME, find_cache
from ..common.whole_files import write_whole
from .cache_rows import RowState, join_rows, split_rows
from .saved_states import fingerprint


logger = logging.get_logger(__name__)

# The number of tokens of a prefix, and a digest of the model and of these tokens.
NAME = re.compile(r"(\d+)-[0-9a-f]{32}")
# When a file that has no name yet was left by a process that ended while it wrote.
SECONDS_UNTIL_ABANDONED = 3600


class _Memory:
    """States by name, the least recently used first."""

    def __init__(self):
        self.rows: OrderedDict[str, RowState] = OrderedDict()
        self.lock = threading.Lock()

    def names(self) -> set[str]:
        with self.lock:
            return set(self.rows)

    def sizes(self) -> dict[str, int]:
        with self.lock:
            return {name: sum(tensor.nbytes for tensor in row.values()) for name, row in self.rows.items()}

    def touch(self, name: str) -> bool:
        """Mark a state as used now; whether there is one."""
        with self.lock:
            if name in self.rows:
                self.rows.move_to_end(name)
            return name in self.rows

    def read(self, name: str) -> RowState | None:
        self.touch(name)
        with self.lock:
            return self.rows.get(name)

    def write(self, name: str, row: RowState) -> None:
        with self.lock:
            self.rows[name] = row

    def remove(self, name: str) -> None:
        with self.lock:
            self.rows.pop(name, None)


class _Folder:
    """
    States as safetensors files of a folder, the time of whose last use is their time of modification.

    No process locks the folder: a file gets its name when it is whole, never changes, and may be gone at any time.
    """

    def __init__(self, folder: Path, device: torch.device):
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.device = folder, device
        for abandoned in folder.glob(".*-*.*"):
            try:
                if time.time() - abandoned.stat().st_mtime > SECONDS_UNTIL_ABANDONED:
                    abandoned.unlink()
            except FileNotFoundError:
                continue

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.safetensors"

    def names(self) -> set[str]:
        stems = (name.removesuffix(".safetensors") for name in os.listdir(self.folder) if name.endswith("safetensors"))
        return {stem for stem in stems if NAME.fullmatch(stem)}

    def sizes(self) -> dict[str, int]:
        used = []
        for name in self.names():
            try:
                status = self._path(name).stat()
            except FileNotFoundError:
                continue
            used.append((status.st_mtime_ns, name, status.st_size))
        return {name: size for _, name, size in sorted(used)}

    def touch(self, name: str) -> bool:
        """Mark a state as used now; whether there is one."""
        try:
            os.utime(self._path(name))
        except FileNotFoundError:
            return False
        return True

    def read(self, name: str) -> RowState | None:
        path = self._path(name)
        self.touch(name)
        try:
            row = safetensors.torch.load_file(path, device=str(self.device))
        except FileNotFoundError:
            return None
        except SafetensorError as error:
            logger.warning(f"The file {path} is damaged and is removed: {error}")
            self.remove(name)
            return None
        return row

    def write(self, name: str, row: RowState) -> None:
        write_whole(
            self._path(name), safetensors.torch.save({key: tensor.contiguous() for key, tensor in row.items()})
        )

    def remove(self, name: str) -> None:
        self._path(name).unlink(missing_ok=True)


class _KeepSegments(StoppingCriteria):
    """It stops nothing, and keeps the states of an answer whenever its text has another `segment_length` tokens."""

    def __init__(self, store: "PrefixStore", cache: Cache, real: torch.Tensor):
        self.store, self.cache, self.real = store, cache, real

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor, **kwargs) -> torch.BoolTensor:
        length = input_ids.shape[1] - 1
        real = torch.cat([self.real, self.real.new_ones(len(self.real), length - self.real.shape[1])], dim=1)
        at_end = real.sum(dim=1) % self.store.segment_length == 0
        if at_end.any() and _holds(self.cache, length):
            rows = split_rows(self.cache, real)
            for i in at_end.nonzero()[:, 0].tolist():
                self.store._write(input_ids[i, :-1].cpu()[real[i]].tolist(), rows[i])
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def _holds(cache: Cache, length: int) -> bool:
    """Whether a cache has seen so many tokens, and no candidates of assisted decoding that may be taken back."""
    return cache.get_seq_length() == length and not any(getattr(layer, "recorded", 0) for layer in cache.layers)


def _fingerprint(model: PreTrainedModel) -> str:
    """A digest of all that decides a state: config, weights, the files of the model's code, and the libraries."""
    libraries = {"torch": torch.__version__, "transformers": transformers.__version__}
    digest = hashlib.blake2b(json.dumps([fingerprint(model), libraries], sort_keys=True).encode(), digest_size=16)
    folders = {Path(inspect.getfile(type(part))).parent for part in (model, model.config)}
    for path in sorted(path for folder in folders for path in folder.rglob("*.py")):
        digest.update(path.name.encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()


class PrefixStore:
    """
    Keeps the states of a causal language model after prefixes of tokens. A prompt that begins with such a prefix is read
    from its end: the next turn of a conversation, or the next of many requests that begin with the same instructions.

    The text is that of [`~transformers.GenerationMixin.generate`] without a store. A prompt is read in segments of
    `segment_length` tokens, so that the logits may differ in their last digits, as with `prefill_chunk_size`.

    The store keeps the states at the end of each prompt (before its last token, whose logits are needed) and of each
    answer, and after every `segment_length` tokens. A state of full attention holds all keys and values up to there; the
    other states have a constant size.

    ```python
    store = PrefixStore(model, "runs/states", max_bytes=2**30)
    store.generate(**tokenizer(text, return_tensors="pt"), max_new_tokens=50)
    with store:  # `model.generate` uses the store, and so does every pipeline of the model
        pipeline("text-generation", model=model, tokenizer=tokenizer)(messages)
    ```

    Args:
        model (`PreTrainedModel`): a causal language model of this package, in eval mode, on one device.
        folder (`str` or `os.PathLike`, *optional*): a folder for the states, which several models and processes may
            share. By default the states are kept in memory, on the device of the model.
        max_bytes (`int`, defaults to 2**30): how much the store holds. What was not used for longest goes first.
        segment_length (`int`, defaults to 256): how many tokens lie between two states of a long text.

    Attributes:
        num_tokens_reused, num_tokens_read (`int`): the tokens that a stored state had seen, and those that were read.

    Raises:
        `ValueError`: a model of another kind, or in training mode; a limit or a length below 1.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        folder: str | os.PathLike | None = None,
        *,
        max_bytes: int = 2**30,
        segment_length: int = 256,
    ):
        config = model.config
        if not hasattr(config, "recurrent_layer_types") or not config.is_causal or not model.can_generate():
            raise ValueError(
                f"A `PrefixStore` is for causal language models of modeling_sumagg, got a {type(model).__name__} of "
                f"model type {config.model_type!r}."
            )
        if len(set(getattr(model, "hf_device_map", {"": None}).values())) > 1:
            raise ValueError(f"The model must be on one device, its `hf_device_map` is {model.hf_device_map}.")
        for name, value in {"max_bytes": max_bytes, "segment_length": segment_length}.items():
            if value < 1:
                raise ValueError(f"`{name}` must be at least 1, got {value}.")
        self.model = model
        self.max_bytes = max_bytes
        self.segment_length = segment_length
        self.num_tokens_reused = self.num_tokens_read = 0
        self._states = _Memory() if folder is None else _Folder(Path(folder), model.device)
        self._plain_generate = model.generate
        self._versions: tuple | None = None
        self._fingerprint = ""

    def __len__(self) -> int:
        """How many states there are, of all models."""
        return len(self._states.names())

    @property
    def nbytes(self) -> int:
        """The bytes of all states."""
        return sum(self._states.sizes().values())

    def __enter__(self) -> "PrefixStore":
        if "generate" in vars(self.model):
            raise ValueError(
                "`model.generate` is replaced already: leave the `with` statement of the other store first."
            )
        self.model.generate = self.generate
        return self

    def __exit__(self, *exception: object) -> None:
        del self.model.generate

    def generate(
        self,
        inputs: torch.Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        *,
        stopping_criteria: list[StoppingCriteria] | None = None,
        **kwargs: Any,
    ) -> ModelOutput | torch.LongTensor:
        """
        [`~transformers.GenerationMixin.generate`] of the model, with the same arguments and the same text.

        The first step of the model sees only the last tokens of the prompt, so that the hidden states and attentions
        that it returns, where they are wanted, are those of these tokens.

        Raises:
            `ValueError`: the model is in training mode; embeddings, positions, a cache, or a kind of cache is passed;
                the mask has another shape than the ids, or is left out although the ids contain padding.
        """
        if inputs is not None:
            kwargs["input_ids"] = inputs
        input_ids = kwargs.get("input_ids")
        self._check_arguments(input_ids, generation_config, kwargs)
        if input_ids is None:
            return self._plain_generate(None, generation_config, stopping_criteria=stopping_criteria, **kwargs)

        def setting(name: str) -> Any:
            configs = (generation_config, self.model.generation_config)
            chosen = (kwargs.get(name), *(getattr(config, name, None) for config in configs))
            return next((value for value in chosen if value is not None), None)

        assisted = ("assistant_model", "assistant_early_exit", "prompt_lookup_num_tokens", "use_mtp")
        if any(setting(name) for name in assisted):
            raise ValueError(
                "Assisted decoding in transformers reads the prompt from its first token, whatever a cache has seen: leave "
                f"{', '.join(f'`{name}`' for name in assisted if setting(name))} out, or call `generate` without a store."
            )
        mask = kwargs.get("attention_mask")
        real = torch.ones_like(input_ids, dtype=torch.bool, device="cpu") if mask is None else mask.bool().cpu()
        # The logits after the last real token of each row are needed: from the first of these tokens on, `generate` reads.
        start = int(real.long().cumsum(dim=1).argmax(dim=1).min())
        prompts = [ids[seen].tolist() for ids, seen in zip(input_ids.cpu()[:, :start], real[:, :start], strict=True)]
        num_beams = setting("num_beams") or 1
        copies = max(num_beams, setting("num_return_sequences") or 1)
        self._update_fingerprint()
        try:
            cache = join_rows(self._read(prompts), real[:, :start], self.model.config)
            if copies > 1 and cache.get_seq_length() > 0:
                cache.batch_repeat_interleave(copies)
            real = real.repeat_interleave(copies, dim=0)
            criteria = StoppingCriteriaList(stopping_criteria or [])
            if num_beams == 1:
                criteria.append(_KeepSegments(self, cache, real))
            output = self._plain_generate(
                None, generation_config, stopping_criteria=criteria, **kwargs, **{CACHE_NAME: cache}
            )
            sequences = (output if isinstance(output, torch.Tensor) else output.sequences).cpu()
            eos = torch.tensor(setting("eos_token_id") if setting("eos_token_id") is not None else [])
            self._keep_answers(sequences, real, cache if num_beams == 1 else None, eos, setting("pad_token_id"))
        finally:
            self._evict()
        return output

    def _check_arguments(
        self, input_ids: torch.Tensor | None, generation_config: GenerationConfig | None, kwargs: dict[str, Any]
    ) -> None:
        if self.model.training:
            raise ValueError("The model is in training mode: call `model.eval()` first.")
        if find_cache(kwargs) is not None:
            raise ValueError("The store passes a cache of its own to `generate`: pass none, or call `model.generate`.")
        for name in ("inputs_embeds", "position_ids", "cache_implementation", "use_cache"):
            if kwargs.get(name) is not None and not (name == "use_cache" and kwargs[name]):
                raise ValueError(
                    f"A store finds a prompt by its `input_ids` and passes a dynamic cache: `{name}` cannot be chosen."
                )
        if input_ids is None:
            return
        mask = kwargs.get("attention_mask")
        if input_ids.dim() != 2 or (mask is not None and mask.shape != input_ids.shape):
            shape = None if mask is None else list(mask.shape)
            raise ValueError(
                "`input_ids` and `attention_mask` must have one shape [B, T], and hold the whole prompt, got "
                f"{list(input_ids.shape)} and {shape}."
            )
        config = generation_config or self.model.generation_config
        pad = kwargs.get("pad_token_id", config.pad_token_id)
        if mask is None and pad is not None and bool((input_ids == pad).any()):
            raise ValueError(f"The ids contain the padding token, {pad}: pass the `attention_mask` of the tokenizer.")

    def _keep_answers(
        self, sequences: torch.Tensor, real: torch.Tensor, cache: Cache | None, eos: torch.Tensor, pad: int | None
    ) -> None:
        """
        Keep the states after the answers.

        Args:
            sequences (`torch.Tensor` of shape `[B, T + new]`): prompts and answers.
            real (`torch.Tensor` of shape `[B, T]`, bool): the real tokens of the prompts.
            cache (`transformers.Cache`, *optional*): the cache of `generate`, row by row that of the sequences.
            eos (`torch.Tensor`): the tokens that end an answer.
            pad (`int`, *optional*): what stands after an answer that is shorter than another.
        """
        prompt_length, length = real.shape[1], sequences.shape[1]
        real = torch.cat([real, real.new_ones(len(real), length - prompt_length)], dim=1)
        rows = split_rows(cache, real[:, :-1]) if cache is not None and _holds(cache, length - 1) else None
        again = []
        for i, sequence in enumerate(sequences):
            ends = torch.isin(sequence[prompt_length:], eos).nonzero()
            end = prompt_length + int(ends[0]) + 1 if len(ends) else length
            while len(sequences) > 1 and end > prompt_length and sequence[end - 1] == pad and not len(ends):
                end -= 1
            if rows is not None and end == length:
                self._write(sequence[:-1][real[i, :-1]].tolist(), rows[i])
            else:
                # Beams were exchanged, or the row has read padding after its answer: the answer alone is read again.
                again.append(sequence[:end][real[i, :end]].tolist())
        self._read(again)

    def _names(self, tokens: list[int], lengths: Iterable[int]) -> list[str]:
        """The names of the states after the first so many of the tokens; the lengths ascend."""
        digest = hashlib.blake2b(self._fingerprint.encode(), digest_size=16)
        names, last = [], 0
        for length in lengths:
            digest.update(torch.tensor(tokens[last:length], dtype=torch.int64).numpy().data)
            names.append(f"{length}-{digest.hexdigest()}")
            last = length
        return names

    def _update_fingerprint(self) -> None:
        """Weights that were changed since the last call make another model, which finds nothing of the one before."""
        tensors = [tensor for tensor in self.model.state_dict().values() if isinstance(tensor, torch.Tensor)]
        versions = tuple((tensor.data_ptr(), tensor._version) for tensor in tensors if not tensor.is_inference())
        if versions != self._versions:
            self._versions, self._fingerprint = versions, _fingerprint(self.model)

    def _longest(self, tokens: list[int], names: set[str]) -> RowState | None:
        """The state after the longest stored prefix of the tokens."""
        lengths = sorted({int(name.partition("-")[0]) for name in names})
        own = self._names(tokens, [length for length in lengths if length <= len(tokens)])
        for name in reversed(own):
            row = self._states.read(name) if name in names else None
            if row is not None:
                return row
        return None

    def _write(self, tokens: list[int], row: RowState) -> None:
        (name,) = self._names(tokens, [len(tokens)])
        if not self._states.touch(name):
            self._states.write(name, row)

    def _evict(self) -> None:
        """Remove the states that were not used for longest, until the others fit."""
        sizes = self._states.sizes()
        total = sum(sizes.values())
        for name, size in sizes.items():
            if total <= self.max_bytes:
                return
            if size > self.max_bytes:
                logger.warning_once(f"A state of {size:,} bytes does not fit into `max_bytes={self.max_bytes:,}`.")
            self._states.remove(name)
            total -= size

    @torch.no_grad()
    def _read(self, texts: list[list[int]]) -> list[RowState | None]:
        """The states after the tokens of each text, of which a stored state has not seen the last; keeps them all."""
        names = self._states.names()
        rows = [self._longest(tokens, names) for tokens in texts]
        lengths = [0 if row is None else int(row["length"]) for row in rows]
        self.num_tokens_reused += sum(lengths)
        self.num_tokens_read += sum(map(len, texts)) - sum(lengths)
        while unread := [i for i, tokens in enumerate(texts) if lengths[i] < len(tokens)]:
            ends = [
                min(lengths[i] // self.segment_length * self.segment_length + self.segment_length, len(texts[i]))
                for i in unread
            ]
            segments = [texts[i][lengths[i] : end] for i, end in zip(unread, ends, strict=True)]
            states = self._read_segments([rows[i] for i in unread], [lengths[i] for i in unread], segments)
            for i, end, state in zip(unread, ends, states, strict=True):
                rows[i], lengths[i] = state, end
                self._write(texts[i][:end], state)
        return rows

    def _read_segments(
        self, rows: list[RowState | None], lengths: list[int], segments: list[list[int]]
    ) -> list[RowState]:
        """The states after one more segment of each row, read as one batch with padding on the left of both."""
        before, new = max(lengths), max(map(len, segments))
        real = torch.tensor(
            [
                [i >= before - length for i in range(before)] + [i >= new - len(segment) for i in range(new)]
                for length, segment in zip(lengths, segments, strict=True)
            ]
        )
        input_ids = torch.tensor([[0] * (new - len(segment)) + segment for segment in segments])
        cache = join_rows(rows, real[:, :before], self.model.config)
        device = self.model.device
        self.model(
            input_ids.to(device),
            attention_mask=None if real.all() else real.to(device),
            logits_to_keep=1,
            **{CACHE_NAME: cache},
        )
        return split_rows(cache, real)


__all__ = ["PrefixStore"]
