"""One model on several devices: tensor parallelism and FSDP in two gloo processes, and parts of a model on disk."""

import faulthandler
import os
import re

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from accelerate import infer_auto_device_map
from testing import MODEL_CLASSES, assert_close, build, tiny_config, tiny_inputs
from torch.distributed.fsdp import FSDPModule
from transformers import set_seed
from transformers.distributed import DistributedConfig

from modeling_sumagg import SumAggForCausalLM, ToSTForCausalLM, ToSTForImageClassification


FAMILIES = (SumAggForCausalLM, ToSTForCausalLM, ToSTForImageClassification)


def make(model_class):
    # transformers 5.17 shards an embedding evenly.
    even = {"vocab_size": 64} if hasattr(model_class.config_class, "vocab_size") else {}
    return build(model_class, tiny_config(model_class, **even))


def start_processes(function, directory):
    mp.spawn(function, args=(str(directory),), nprocs=2)


def join_group(rank, directory):
    # A process that dies in native code says where.
    faulthandler.enable(all_threads=True)
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2")
    dist.init_process_group("gloo", init_method=f"file://{directory}/rendezvous", rank=rank, world_size=2)
    set_seed(0)


def shard_tensors_and_compare(rank, directory):
    """In each of two processes: every model, sharded, computes what it computes whole."""
    join_group(rank, directory)
    config = DistributedConfig(tp_plan="auto", tp_size=2)
    for model_class in FAMILIES:
        whole = model_class.from_pretrained(f"{directory}/{model_class.__name__}")
        sharded = model_class.from_pretrained(f"{directory}/{model_class.__name__}", distributed_config=config)
        inputs = tiny_inputs(whole)
        with torch.no_grad():
            expected, actual = whole(**inputs), sharded(**inputs)
        assert_close(actual.logits, expected.logits)
        if model_class is SumAggForCausalLM:
            # Each process keeps the state of its own half of the heads, and the last inputs of the convolution over them.
            states, whole_states = (out.cache.layers[0].states for out in (actual, expected))
            for operator, dimension in (("causal_keyed_sum", 1), ("causal_convolution", 2)):
                (state,), (whole_state,) = states[operator], whole_states[operator]
                assert_close(state, whole_state.chunk(2, dim=dimension)[rank])
        if whole.can_generate():
            settings = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
            assert torch.equal(sharded.generate(**inputs, **settings), whole.generate(**inputs, **settings))
    dist.destroy_process_group()


@pytest.mark.slow
def test_tensor_parallel(tmp_path):
    for model_class in FAMILIES:
        make(model_class).save_pretrained(tmp_path / model_class.__name__)
    start_processes(shard_tensors_and_compare, tmp_path)


def squared(outputs):
    """A loss of everything a model returns, the mean over its rows."""
    first = outputs[0]
    return sum(part.square().mean() for part in (first if isinstance(first, tuple) else (first,)))


def shard_parameters_and_compare(rank, directory):
    """In each of two processes: half of the rows and of every parameter give the gradients of all rows."""
    join_group(rank, directory)
    for model_class in MODEL_CLASSES:
        folder = f"{directory}/{model_class.__name__}"
        whole = model_class.from_pretrained(folder)
        sharded = model_class.from_pretrained(folder, distributed_config=DistributedConfig(fsdp_size=2))
        layers = [m for name, m in sharded.named_modules() if re.search(r"layers\.\d+$", name)]
        assert all(isinstance(layer, FSDPModule) for layer in layers), f"{model_class.__name__}: a layer is no unit"
        inputs = tiny_inputs(whole, batch_size=4)
        squared(whole(**inputs)).backward()
        squared(sharded(**{name: tensor[rank::2] for name, tensor in inputs.items()})).backward()
        for (name, expected), actual in zip(whole.named_parameters(), sharded.parameters(), strict=True):
            assert actual.placements[0].is_shard(), name
            assert (actual.grad is None) == (expected.grad is None), name
            if expected.grad is not None:
                # That of a bias of keys is zero but for rounding.
                torch.testing.assert_close(actual.grad.full_tensor(), expected.grad, rtol=1e-4, atol=1e-6)
    dist.destroy_process_group()


@pytest.mark.slow
def test_fsdp(tmp_path):
    for model_class in MODEL_CLASSES:
        make(model_class).save_pretrained(tmp_path / model_class.__name__)
    start_processes(shard_parameters_and_compare, tmp_path)


@pytest.mark.parametrize("model_class", FAMILIES)
def test_device_map_keeps_blocks_whole(model_class, tmp_path):
    model = make(model_class)
    model.save_pretrained(tmp_path / "model")
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    device_map = infer_auto_device_map(
        model, max_memory={"cpu": int(0.6 * size)}, no_split_module_classes=model._no_split_modules
    )
    assert set(device_map.values()) == {"cpu", "disk"}
    blocks = [name for name, module in model.named_modules() if type(module).__name__ in model._no_split_modules]
    assert not [part for part in device_map for block in blocks if part.startswith(f"{block}.")]

    split = model_class.from_pretrained(tmp_path / "model", device_map=device_map, offload_folder=tmp_path / "disk")
    inputs = tiny_inputs(model)
    with torch.no_grad():
        assert_close(split(**inputs).logits, model(**inputs).logits)
