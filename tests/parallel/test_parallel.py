"""One model on several devices: tensor parallelism in two gloo processes, and parts of a model on disk."""

import os

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from accelerate import infer_auto_device_map
from testing import assert_close, build, sumagg_config
from transformers.distributed import DistributedConfig

from modeling_sumagg import SumAggForCausalLM, ToSTConfig, ToSTForCausalLM, ToSTForImageClassification, ToSTTextConfig


def make(model_class):
    if model_class is SumAggForCausalLM:
        return build(model_class, sumagg_config("hybrid", vocab_size=64))
    if model_class is ToSTForCausalLM:
        sizes = {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
        layer_types = ["token_statistics", "full_attention"]
        return build(model_class, ToSTTextConfig(**sizes, max_position_embeddings=64, layer_types=layer_types))
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 8, "image_size": 32}
    return build(model_class, ToSTConfig(**sizes, num_labels=4))


def inputs_of(model):
    torch.manual_seed(0)
    if isinstance(model, ToSTForImageClassification):
        return {"pixel_values": torch.randn(2, 3, 32, 32)}
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[0, :3] = 0
    return {"input_ids": torch.randint(64, (2, 9)), "attention_mask": mask}


MODEL_CLASSES = (SumAggForCausalLM, ToSTForCausalLM, ToSTForImageClassification)


def shard_and_compare(rank, directory):
    """In each of two processes: every model, sharded, computes what it computes whole."""
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2")
    dist.init_process_group("gloo", init_method=f"file://{directory}/rendezvous", rank=rank, world_size=2)
    config = DistributedConfig(tp_plan="auto", tp_size=2)
    for model_class in MODEL_CLASSES:
        whole = model_class.from_pretrained(f"{directory}/{model_class.__name__}")
        sharded = model_class.from_pretrained(f"{directory}/{model_class.__name__}", distributed_config=config)
        inputs = inputs_of(whole)
        with torch.no_grad():
            expected, actual = whole(**inputs), sharded(**inputs)
        assert_close(actual.logits, expected.logits)
        if model_class is SumAggForCausalLM:
            # Each process keeps the running sums of its own half of the channels.
            (state,), (whole_state,) = (out.past_key_values.layers[0].state for out in (actual, expected))
            assert_close(state, whole_state.chunk(2, dim=1)[rank])
        if whole.can_generate():
            settings = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
            assert torch.equal(sharded.generate(**inputs, **settings), whole.generate(**inputs, **settings))
    dist.destroy_process_group()


@pytest.mark.slow
def test_tensor_parallel(tmp_path):
    for model_class in MODEL_CLASSES:
        make(model_class).save_pretrained(tmp_path / model_class.__name__)
    mp.spawn(shard_and_compare, args=(str(tmp_path),), nprocs=2)


@pytest.mark.parametrize("model_class", MODEL_CLASSES)
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
    inputs = inputs_of(model)
    with torch.no_grad():
        assert_close(split(**inputs).logits, model(**inputs).logits)
