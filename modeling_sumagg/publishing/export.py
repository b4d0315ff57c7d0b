"""A saved model as ONNX graphs, or as a web page that writes without a server."""

import hashlib
import json
import os
import shutil
import subprocess
import tarfile
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from torch.export import Dim
from transformers import AutoConfig, GenerationConfig, PreTrainedConfig, PreTrainedModel

from ..models.families import FAMILIES
from . import onnx_text
from .files import refuse_what_is_there, unfinished_folder
from .onnx_graphs import Step, quantize, save_graphs, step_graph, whole_graph


FORMATS = ("onnx", "web")
# Where the web page comes from: the packages of npm, their versions, and the files that the page loads.
WEB_PACKAGES = {
    "onnxruntime-web@1.30.0": ("dist/ort.wasm.bundle.min.mjs", "dist/ort-wasm-simd-threaded.wasm"),
    "@huggingface/tokenizers@0.2.0": ("dist/tokenizers.min.mjs",),
}
# What stands beside the graphs, as far as the folder has it.
COPIED = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "vocab.json",
    "preprocessor_config.json",
    "processor_config.json",
)
# The settings of `generate` that the exported writer follows, with transformers' defaults.
SETTINGS = {
    "do_sample": False,
    "temperature": 1.0,
    "top_k": 50,
    "top_p": 1.0,
    "repetition_penalty": 1.0,
    "max_new_tokens": 128,
}
# Settings that do not change which token is chosen.
NEUTRAL = ("bos_token_id", "eos_token_id", "pad_token_id", "use_cache", "max_length", "transformers_version")
SEGMENT_LENGTH = 64
# Relative to the largest logit.
TOLERANCE = 1e-3


def export_folder(
    folder: str | os.PathLike,
    output_dir: str | os.PathLike,
    *,
    to: str = "onnx",
    int8: bool = False,
    max_length: int = 1024,
) -> list[str]:
    """
    Write the ONNX graphs of a saved model, and check them: a language model against the tokens of `generate`, any other
    model against its logits.

    A language model becomes `prefill.onnx` (two tokens or more) and `decode.onnx` (one token), whose inputs and outputs
    are the tokens, the logits and the state; beside them stand `manifest.json`, the tokenizer, and `run.py`, which writes
    with numpy and onnxruntime alone. Any other model becomes `model.onnx`. The weights are in `weights.bin`.

    Args:
        folder (`str` or `os.PathLike`): the folder that `save_pretrained` wrote.
        output_dir (`str` or `os.PathLike`): a new or empty folder. It is written whole or not at all.
        to (`str`, defaults to `"onnx"`): with `"web"`, for language models, the page and all that it loads stand there too.
        int8 (`bool`, defaults to `False`): whether to keep the weights of matrix products and embeddings in 8 bits.
        max_length (`int`, defaults to 1024): how many tokens a layer of full attention has columns for. Other layers
            have no limit.

    Returns:
        `list[str]`: what was written and measured, in words.

    Raises:
        `ValueError`: the folder is no checkpoint of this package, the target is not empty, the settings of `generate` are
            not known to the exported writer, or the page is wanted of another model than a causal language model.
        `OSError`: npm is missing or fails.
        `RuntimeError`: the graphs do not compute the results of the model.
    """
    folder, target = Path(folder), Path(output_dir)
    if to not in FORMATS:
        raise ValueError(f"`to` must be one of {list(FORMATS)}, got {to!r}.")
    if max_length < 1:
        raise ValueError(f"`max_length` must be at least 1, got {max_length}.")
    refuse_what_is_there(target)
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} holds no config.json: give a folder that `save_pretrained` wrote.")
    config = AutoConfig.from_pretrained(folder)
    model_class = _model_class(config)
    writes = model_class.can_generate()
    if to == "web" and not writes:
        raise ValueError(f"The web page is for causal language models, and {folder} holds a {model_class.__name__}.")
    if writes and not (folder / "tokenizer.json").is_file():
        raise ValueError(f"{folder} holds no tokenizer.json: save the tokenizer there with `save_pretrained`.")
    model = model_class.from_pretrained(folder, dtype=torch.float32).eval()
    with unfinished_folder(target) as written:
        for file in COPIED:
            if (folder / file).is_file():
                shutil.copyfile(folder / file, written / file)
        if writes:
            report = _export_writer(model, written, folder.resolve().name, int8, max_length)
        else:
            report = _export_whole(model, written, int8)
        if to == "web":
            _add_page(written)
    size = sum(file.stat().st_size for file in target.iterdir() if file.suffix in (".onnx", ".bin"))
    files = ", ".join(sorted(file.name for file in target.iterdir()))
    hint = f"Look at it: python -m http.server --directory {target}" if to == "web" else ""
    return [
        f"{target}: {files}.",
        f"The graphs and weights take {size / 2**20:.1f} MiB.",
        *report,
        *([hint] if hint else []),
    ]


def _model_class(config: PreTrainedConfig) -> type[PreTrainedModel]:
    known = {cls.__name__: cls for family in FAMILIES.values() for cls in family.models.values()}
    name = (config.architectures or [None])[0]
    if name not in known:
        raise ValueError(f"`architectures` in config.json must be one of {sorted(known)}, got {name!r}.")
    return known[name]


def _writer_settings(config: GenerationConfig) -> dict[str, Any]:
    """The settings by which tokens are chosen."""
    chosen = {name for name, value in config.to_diff_dict().items() if value not in (None, False)}
    unknown = sorted(name for name in chosen - SETTINGS.keys() - set(NEUTRAL) if not name.startswith("_"))
    if unknown:
        raise ValueError(
            f"The exported writer knows the settings {sorted(SETTINGS)} of `generate`, and generation_config.json also "
            f"has {unknown}: remove them there."
        )
    values = {name: getattr(config, name) for name in SETTINGS}
    return {name: SETTINGS[name] if value is None else value for name, value in values.items()}


def _export_writer(model: PreTrainedModel, folder: Path, name: str, int8: bool, max_length: int) -> list[str]:
    config, settings = model.config, _writer_settings(model.generation_config)
    limits = [max_length] if "full_attention" in config.layer_types else []
    # Where something is learned for each position.
    positions = getattr(config, "max_position_embeddings", None)
    limits += [] if positions is None else [positions]
    limit = min(limits, default=None)
    # Without full attention the columns of a static cache have no bearing.
    step = Step(model, limit or 1)
    graphs = {"prefill.onnx": step_graph(step, 2 * SEGMENT_LENGTH), "decode.onnx": step_graph(step, 1)}
    state = [
        {"name": name, "dtype": str(tensor.dtype).removeprefix("torch."), "shape": list(tensor.shape)}
        for name, tensor in zip(step.names, step.empty_state(), strict=True)
    ]
    eos = model.generation_config.eos_token_id
    manifest = {
        "name": name,
        "vocab_size": config.vocab_size,
        "segment_length": SEGMENT_LENGTH,
        "max_length": limit,
        "eos_token_ids": [] if eos is None else eos if isinstance(eos, list) else [eos],
        "generation": settings,
        "length": step.names[0],
        "state_bytes": sum(tensor.nbytes for tensor in step.empty_state()),
        "state": state,
    }
    shutil.copyfile(onnx_text.__file__, folder / "run.py")

    def save() -> onnx_text.TextModel:
        save_graphs(graphs, folder)
        digest = hashlib.sha256(b"".join((folder / file).read_bytes() for file in (*graphs, "weights.bin")))
        manifest["fingerprint"] = digest.hexdigest()
        (folder / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
        return onnx_text.TextModel(folder)

    wrong, checked = _disagreements(save(), model, limit)
    if wrong:
        raise RuntimeError(f"Of {checked} tokens of `generate` the graphs would have written {wrong} differently.")
    report = [
        f"The state takes {manifest['state_bytes'] / 1024:.1f} KiB.",
        f"All {checked} tokens of `generate` are those of the graphs.",
    ]
    if int8:
        for file in graphs:
            graphs[file] = quantize(graphs[file], folder)
        wrong, checked = _disagreements(save(), model, limit)
        report[1:] = [
            f"In int8, {checked - wrong} of {checked} tokens of `generate` are the likeliest of the graphs too."
        ]
    return report


@torch.no_grad()
def _disagreements(writer: onnx_text.TextModel, model: PreTrainedModel, limit: int | None) -> tuple[int, int]:
    """How many tokens that `generate` writes greedily are not the likeliest of the graphs, and of how many."""
    wrong = checked = 0
    new = 24
    for length in (1, 2, SEGMENT_LENGTH + 1, 2 * SEGMENT_LENGTH + 7):
        if limit is not None and length + new > limit:
            continue
        draw = torch.Generator().manual_seed(length)
        prompt = torch.randint(model.config.vocab_size, (1, length), generator=draw)
        written = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=new,
            do_sample=False,
            num_beams=1,
            repetition_penalty=1.0,
            eos_token_id=None,
            pad_token_id=0,
        )[0].tolist()
        state, unread = writer.empty_state(), written[:length]
        for token in written[length:]:
            logits, state = writer.read(unread, state)
            if not np.isfinite(logits).all():
                raise RuntimeError(f"After {length} tokens the graphs give logits that are not finite.")
            wrong += bool(logits.max() - logits[token] > TOLERANCE * np.abs(logits).max())
            checked, unread = checked + 1, [token]
    if not checked:
        raise ValueError(f"`max_length` must leave room for a prompt and {new} tokens, got {limit}.")
    return wrong, checked


def _sample_inputs(model: PreTrainedModel, batch_size: int, length: int) -> dict[str, torch.Tensor]:
    """Inputs of a model that reads at once, the second row of them shorter than the others."""
    config, inputs = model.config, {}
    if hasattr(config, "num_mel_bins"):
        length *= config.subsampling_factor
        inputs["input_features"] = torch.randn(batch_size, length, config.num_mel_bins)
    elif hasattr(config, "vocab_size"):
        inputs["input_ids"] = torch.randint(config.vocab_size, (batch_size, length))
    if inputs:
        mask = torch.ones(batch_size, length, dtype=torch.long)
        mask[1, length // 2 :] = 0
        inputs["attention_mask"] = mask
    if hasattr(config, "image_size"):
        inputs["pixel_values"] = torch.randn(batch_size, config.num_channels, config.image_size, config.image_size)
    if hasattr(config, "num_numeric_features"):
        inputs["numeric_features"] = torch.randn(batch_size, config.num_numeric_features)
    return inputs


@torch.no_grad()
def _export_whole(model: PreTrainedModel, folder: Path, int8: bool) -> list[str]:
    if hasattr(model.config, "use_cache"):
        model.config.use_cache = False
    sequences = ("input_ids", "attention_mask", "input_features")
    inputs = _sample_inputs(model, 2, 9)
    dynamic = {name: {0: Dim.AUTO, 1: Dim.AUTO} if name in sequences else {0: Dim.AUTO} for name in inputs}
    graph = whole_graph(model, inputs, dynamic)
    save_graphs({"model.onnx": graph}, folder)
    error = _largest_error(model, folder)
    if error > TOLERANCE:
        raise RuntimeError(f"The logits of the graph are off by {error:.1e} of the largest logit.")
    if int8:
        save_graphs({"model.onnx": quantize(graph, folder)}, folder)
        error = _largest_error(model, folder)
    return [f"The logits of other inputs are off by {error:.1e} of the largest logit."]


def _largest_error(model: PreTrainedModel, folder: Path) -> float:
    """Of the logits of real tokens, or of all there are, relative to the largest."""
    session, worst = onnxruntime.InferenceSession(folder / "model.onnx"), 0.0
    for batch_size, length in ((3, 14), (2, 40)):
        inputs = _sample_inputs(model, batch_size, length)
        expected = model(**inputs).logits
        (logits,) = session.run(None, {name: tensor.numpy() for name, tensor in inputs.items()})
        difference = (torch.from_numpy(logits) - expected).abs()
        worst = max(worst, float(difference.max() / expected.abs().max()))
    return worst


def _add_page(folder: Path) -> None:
    """Put the page beside the graphs, with the packages of npm that it loads."""
    for file in (Path(__file__).parent / "web").iterdir():
        shutil.copyfile(file, folder / file.name)
    if shutil.which("npm") is None:
        raise OSError("The web page needs npm, which fetches onnxruntime-web: install Node.js.")
    licenses = []
    with tempfile.TemporaryDirectory() as downloads:
        for package, files in WEB_PACKAGES.items():
            command = ["npm", "pack", package, "--pack-destination", downloads, "--json"]
            result = subprocess.run(command, capture_output=True, text=True, cwd=downloads)
            if result.returncode:
                raise OSError(f"`{' '.join(command[:3])}` failed: {result.stderr.strip()[-500:]}")
            (archive,) = Path(downloads).glob("*.tgz")
            with tarfile.open(archive) as tar:
                for file in files:  # type: ignore[assignment]
                    (folder / Path(file).name).write_bytes(tar.extractfile(f"package/{file}").read())
                about = json.load(tar.extractfile("package/package.json"))  # type: ignore[arg-type]
            archive.unlink()
            licenses.append(f"{package}: license {about['license']}, {about.get('homepage', about['name'])}")
    (folder / "THIRD_PARTY.txt").write_text("\n".join(licenses) + "\n", encoding="utf-8")


__all__ = ["export_folder"]
