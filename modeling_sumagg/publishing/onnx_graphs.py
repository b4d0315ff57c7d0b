"""ONNX graphs of models: a language model as a step with its state as inputs and outputs, other models as one call."""

import contextlib
import copy
import hashlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.export import Dim
from transformers import PreTrainedModel, StaticCache

from ..decoder.recurrence import RecurrentLayer


try:
    import onnx_ir
    import onnxruntime  # noqa: F401
    import onnxscript  # noqa: F401
except ImportError as error:
    raise ImportError(
        f"The export needs {error.name}: run `pip install onnx onnxscript onnxruntime tokenizers`."
    ) from error


class Step(nn.Module):
    """
    One segment of a language model, whose state is its argument and its result.

    Args:
        model (`PreTrainedModel`): a causal language model.
        max_length (`int`): the tokens for which layers of full attention keep columns.

    Attributes:
        names (`list[str]`): the tensors of the state, the number of tokens seen in each layer among them.
    """

    def __init__(self, model: PreTrainedModel, max_length: int):
        super().__init__()
        self.model = model
        self.cache = StaticCache(config=model.config, max_cache_len=max_length)
        # The first token makes the tensors.
        with torch.no_grad():
            model(torch.zeros(1, 1, dtype=torch.long), past_key_values=self.cache)
        self.cache.reset()
        self.names = list(self._tensors(self.cache))

    @staticmethod
    def _tensors(cache: StaticCache) -> dict[str, torch.Tensor]:
        tensors = {}
        for i, layer in enumerate(cache.layers):
            tensors[f"layers.{i}.length"] = layer.cumulative_length
            if isinstance(layer, RecurrentLayer):
                tensors |= {f"layers.{i}.{name}.{j}": t for name, s in layer.states.items() for j, t in enumerate(s)}
            else:
                tensors |= {f"layers.{i}.keys": layer.keys, f"layers.{i}.values": layer.values}
        return tensors

    def empty_state(self) -> tuple[torch.Tensor, ...]:
        """The state of no tokens."""
        return tuple(torch.zeros_like(tensor) for tensor in self._tensors(self.cache).values())

    def _cache(self, state: tuple[torch.Tensor, ...]) -> StaticCache:
        cache = copy.copy(self.cache)
        cache.layers = [copy.copy(layer) for layer in self.cache.layers]
        held = dict(zip(self.names, (tensor.clone() for tensor in state), strict=True))
        for i, layer in enumerate(cache.layers):
            layer.cumulative_length = held[f"layers.{i}.length"]
            if isinstance(layer, RecurrentLayer):
                layer.states = {
                    name: tuple(held[f"layers.{i}.{name}.{j}"] for j in range(len(tensors)))
                    for name, tensors in layer.states.items()
                }
            else:
                layer.keys, layer.values = held[f"layers.{i}.keys"], held[f"layers.{i}.values"]
        return cache

    def forward(self, input_ids: torch.Tensor, state: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        """
        Args:
            input_ids (`torch.Tensor` of shape `[1, T]`): the tokens after those that the state has seen.
            state (`tuple[torch.Tensor, ...]`): the tensors `names`.

        Returns:
            `tuple[torch.Tensor, ...]`: the logits `[1, V]` after the last token, and the state after it.
        """
        cache = self._cache(state)
        logits = self.model(input_ids, past_key_values=cache, logits_to_keep=1).logits[:, -1]
        return logits, *self._tensors(cache).values()


class Logits(nn.Module):
    """The logits of a model that reads its inputs at once."""

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        self.model = model

    def forward(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        return self.model(**inputs).logits


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The exporter of PyTorch does not speak of packages that a model without images does not need."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


@torch.no_grad()
def step_graph(step: Step, length: int) -> onnx_ir.Model:
    """The graph of segments of one token, or, from a sample of more than one, of any number of tokens from two on."""
    state = step.empty_state()
    # A named dimension is refused where a key is repeated for several queries: the export cannot prove that the smaller of
    # two strides is the smaller one for every length.
    shapes = None if length == 1 else ({1: Dim.AUTO(min=2, max=2**31 - 1)}, (None,) * len(state))
    with _quiet():
        program = torch.export.export(step, (torch.zeros(1, length, dtype=torch.long), state), dynamic_shapes=shapes)
        graph = torch.onnx.export(
            program,
            input_names=["input_ids", *step.names],
            output_names=["logits", *(f"after.{name}" for name in step.names)],
            dynamo=True,
            verbose=False,
        )
    return graph.model


@torch.no_grad()
def whole_graph(model: PreTrainedModel, inputs: dict[str, torch.Tensor], dynamic: dict[str, Any]) -> onnx_ir.Model:
    """The graph of a model that reads its inputs at once; `dynamic` names the dimensions of any size of each input."""
    with _quiet():
        program = torch.export.export(Logits(model), (inputs,), dynamic_shapes=(dynamic,))
        graph = torch.onnx.export(
            program, input_names=list(inputs), output_names=["logits"], dynamo=True, verbose=False
        )
    return graph.model


def save_graphs(graphs: dict[str, onnx_ir.Model], folder: Path) -> None:
    """Write graphs by their file names, and the weights that they share once, in `weights.bin`."""
    places: dict[str, tuple[int, int]] = {}
    with open(folder / "weights.bin", "wb") as file:
        for graph in graphs.values():
            # The exporter notes down the lines of code, with their paths, that each operation comes from.
            for node in graph.graph.all_nodes():
                node.metadata_props.clear()
            for name, value in graph.graph.initializers.items():
                tensor = value.const_value
                content = tensor.tobytes()
                if len(content) < 1024:
                    continue
                digest = hashlib.sha256(content).hexdigest()
                if digest not in places:
                    # Aligned, so that a file can be mapped into memory.
                    file.write(bytes(-file.tell() % 64))
                    places[digest] = (file.tell(), len(content))
                    file.write(content)
                value.const_value = onnx_ir.ExternalTensor(
                    "weights.bin", *places[digest], tensor.dtype, shape=tensor.shape, name=name, base_dir=folder
                )
    for name, graph in graphs.items():
        onnx_ir.save(graph, folder / name)


def quantize(graph: onnx_ir.Model, folder: Path) -> onnx_ir.Model:
    """The graph with int8 weights in its matrix products, by onnxruntime; activations become int8 when it runs."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    # A matrix product is only seen to have constant weights if nothing turns them over.
    for node in list(graph.graph):
        weight = node.inputs[0].const_value if node.op_type == "Transpose" else None
        if weight is not None:
            turned = onnx_ir.tensor(weight.numpy().T.copy(), name=node.outputs[0].name)
            value = onnx_ir.val(turned.name, const_value=turned)
            node.outputs[0].replace_all_uses_with(value)
            graph.graph.remove(node)
            graph.graph.register_initializer(value)
    source, target = folder / "exact.onnx", folder / "int8.onnx"
    onnx_ir.save(graph, source)
    quantize_dynamic(
        source, target, weight_type=QuantType.QInt8, per_channel=True, op_types_to_quantize=["MatMul", "Gather"]
    )
    quantized = onnx_ir.load(target)
    source.unlink()
    target.unlink()
    return quantized


__all__ = ["Step", "quantize", "save_graphs", "step_graph", "whole_graph"]
