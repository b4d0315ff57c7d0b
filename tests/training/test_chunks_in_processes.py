"""Gradients in chunks in two gloo processes, each with half of the rows, against those of all rows in one."""

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from testing import assert_close, build, sumagg_config, tost_text_config
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import set_seed

from modeling_sumagg import SumAggForCausalLM, SumAggForSequenceClassification, ToSTForCausalLM
from modeling_sumagg.training import backward_in_chunks


KINDS = {
    "sums and attention": (SumAggForCausalLM, sumagg_config("hybrid")),
    "token statistics and a window": (ToSTForCausalLM, tost_text_config("sliding")),
    "classifier": (SumAggForSequenceClassification, sumagg_config("sliding", num_labels=3, pooling="mean")),
}


def shard(model):
    for layer in model.model.layers:
        fully_shard(layer)
    return fully_shard(model)


def compare(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    for model_class, config in KINDS.values():
        set_seed(0)
        # Rows of different lengths, so that the two processes have different numbers of chunks.
        ids, lengths = torch.randint(61, (2, 23)), (23, 9)
        mask = torch.arange(23)[None] < torch.tensor(lengths)[:, None]
        is_classifier = model_class is SumAggForSequenceClassification
        labels = torch.tensor([2, 0]) if is_classifier else ids.masked_fill(~mask, -100)
        count = None if is_classifier else (labels[:, 1:] != -100).sum()

        whole = build(model_class, config)
        loss = whole(ids, attention_mask=mask, labels=labels).loss
        loss.backward()
        for wrap in (DistributedDataParallel, shard):
            model = wrap(build(model_class, config))
            own = slice(0, lengths[rank])
            own_loss = backward_in_chunks(
                model,
                ids[rank : rank + 1, own],
                labels[rank : rank + 1] if is_classifier else labels[rank : rank + 1, own],
                # The gradients of the processes are averaged, not summed.
                num_items_in_batch=None if count is None else count / 2,
                chunk_length=4,
            )
            dist.all_reduce(own_loss)
            assert_close(own_loss / 2, loss)
            inner = model.module if wrap is DistributedDataParallel else model
            for (name, parameter), expected in zip(inner.named_parameters(), whole.parameters(), strict=True):
                gradient = parameter.grad if wrap is DistributedDataParallel else parameter.grad.full_tensor()
                torch.testing.assert_close(gradient, expected.grad, rtol=1e-4, atol=1e-6, msg=name)
    dist.destroy_process_group()


@pytest.mark.slow
def test_data_parallel_and_sharded(tmp_path):
    mp.spawn(compare, args=(str(tmp_path),), nprocs=2)
