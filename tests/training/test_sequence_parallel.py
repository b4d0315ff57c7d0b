"""One sequence over 2 and 4 gloo processes: loss, gradients and a step of AdamW are those of one process."""

import copy
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from testing import assert_close, build, sumagg_config, tost_text_config
from transformers import set_seed

from modeling_sumagg import (
    SumAggForCausalLM,
    SumAggForSequenceClassification,
    SumAggForTokenClassification,
    ToSTForCausalLM,
)
from modeling_sumagg.training.sequence_parallel import backward_in_parallel


FREE_TOST = {"position_embedding_type": "none", "use_membership_bias": False}
KINDS = {
    "sums": (SumAggForCausalLM, sumagg_config("pure")),
    "means": (SumAggForCausalLM, sumagg_config("pure", sum_normalization="mean", sum_decay="learned")),
    "sums that do not decay": (
        SumAggForCausalLM,
        sumagg_config("pure", sum_decay="none", sum_normalization="none", conv_kernel_size=None),
    ),
    "sums with keys": (SumAggForCausalLM, sumagg_config("pure", sum_state_size=4)),
    "window last": (SumAggForCausalLM, sumagg_config("sliding")),
    "full attention": (SumAggForCausalLM, sumagg_config("hybrid")),
    "token statistics": (ToSTForCausalLM, tost_text_config("pure")),
    "decayed token statistics": (ToSTForCausalLM, tost_text_config("sliding", sum_decay="input", **FREE_TOST)),
    "classes of tokens": (SumAggForTokenClassification, sumagg_config("sliding", num_labels=5)),
}


def batches():
    """Inputs whose parts are longer and shorter than the window and the convolution; documents, padding."""
    ids = torch.randint(61, (2, 5))
    yield {"input_ids": ids, "labels": ids % 5}
    ids, length = torch.randint(61, (2, 21)), 21
    mask = torch.arange(length)[None] < torch.tensor([length, 2 * length // 3])[:, None]
    yield {"input_ids": ids, "labels": (ids % 5).masked_fill(~mask, -100), "attention_mask": mask}
    yield {"input_ids": ids, "labels": ids % 5, "attention_mask": torch.rand(2, length) < 0.6}
    positions = torch.stack([torch.arange(length) % 4, torch.arange(length) % max(length // 2, 1)])
    yield {"input_ids": ids, "labels": (ids % 5).masked_fill(positions == 0, -100), "position_ids": positions}


def without_labels_behind_padding(batch):
    """A real token predicts every label that is left, wherever the parts are cut."""
    if "attention_mask" in batch:
        mask = batch["attention_mask"]
        hidden = ~mask | ~torch.nn.functional.pad(mask[:, :-1], (1, 0))
        batch = {**batch, "labels": batch["labels"].masked_fill(hidden, -100)}
    return batch


def compare(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=4)
    two = dist.new_group([0, 1])
    for kind, (model_class, config) in KINDS.items():
        # All processes draw the same batches.
        set_seed(0)
        for number, batch in enumerate(map(without_labels_behind_padding, batches())):
            set_seed(number)
            whole = build(model_class, copy.deepcopy(config)).double()
            initial = copy.deepcopy(whole)
            loss = whole(**batch, use_cache=False).loss
            loss.backward()
            # Every batch is read whole by all processes and by two; in chunks, by two and by all in turns.
            in_chunks = (None, 4) if number % 2 else (two, 6)
            for group, chunk_length in ((None, None), (two, None), in_chunks):
                if group is two and rank > 1:
                    continue
                model = copy.deepcopy(initial)
                actual = backward_in_parallel(model, **batch, chunk_length=chunk_length, group=group)
                assert_close(actual, loss, 1e-6)
                for (name, parameter), expected in zip(model.named_parameters(), whole.parameters(), strict=True):
                    case = f"{kind}, batch {number}, chunks of {chunk_length}, {name}: "
                    torch.testing.assert_close(parameter.grad, expected.grad, rtol=1e-5, atol=1e-7, msg=case.__add__)
                # The gradients of another batch are added.
                if number == 0:
                    backward_in_parallel(model, **batch, group=group)
                    for parameter, expected in zip(model.parameters(), whole.parameters(), strict=True):
                        torch.testing.assert_close(parameter.grad, 2 * expected.grad, rtol=1e-5, atol=1e-7)
        for trained in (whole, model) if rank < 2 else ():
            torch.optim.AdamW(trained.parameters(), lr=1e-2).step()
        if rank < 2:
            for parameter, expected in zip(model.parameters(), whole.parameters(), strict=True):
                torch.testing.assert_close(parameter, expected, rtol=1e-5, atol=1e-5)
    check_dropout(rank)
    check_bytes()
    check_errors()
    dist.destroy_process_group()


def check_dropout(rank):
    """The gradients are those of the loss with what each process drops, in chunks too, which are read twice."""
    set_seed(0)
    dropouts = {"hidden_dropout": 0.3, "attention_dropout": 0.3}
    model = build(SumAggForCausalLM, sumagg_config("sliding", **dropouts)).double().train()
    ids = torch.randint(61, (2, 24))
    directions = [torch.randn_like(parameter) for parameter in model.parameters()]
    for chunk_length in (None, 8):

        def loss(step=0.0, chunk_length=chunk_length):
            set_seed(10 + rank)
            with torch.no_grad():
                for parameter, direction in zip(model.parameters(), directions, strict=True):
                    parameter.add_(step * direction)
            model.zero_grad()
            # With smoothing the loss is not rounded to float32.
            found = backward_in_parallel(model, ids, ids, chunk_length=chunk_length, label_smoothing=0.1)
            with torch.no_grad():
                for parameter, direction in zip(model.parameters(), directions, strict=True):
                    parameter.sub_(step * direction)
            return found

        slope = (loss(1e-6) - loss(-1e-6)) / 2e-6
        loss()
        gradients = [parameter.grad for parameter in model.parameters()]
        expected = sum((gradient * direction).sum() for gradient, direction in zip(gradients, directions, strict=True))
        torch.testing.assert_close(slope, expected, rtol=1e-5, atol=1e-7)


def check_bytes():
    """What a process sends forward does not depend on the length, but for full attention."""
    for kind, (model_class, config) in KINDS.items():
        sent = []
        set_seed(0)
        for length in (32, 64):
            ids = torch.randint(61, (1, length))
            model = build(model_class, copy.deepcopy(config))
            with mock.patch.object(dist, "all_gather", wraps=dist.all_gather) as gather:
                backward_in_parallel(model, ids, ids % 5)
            sent.append(sum(call.args[1].nbytes for call in gather.call_args_list))
        assert (sent[0] == sent[1]) == (kind != "full attention"), (kind, sent)


def check_errors():
    set_seed(0)
    model, ids = build(*KINDS["sums"]), torch.randint(61, (1, 8))
    mask = torch.tensor([[1, 1, 1, 1, 0, 1, 1, 1]])
    with pytest.raises(ValueError, match="Token 4 begins the part of a process with padding that has a label"):
        backward_in_parallel(model, ids, ids, attention_mask=mask)
    with pytest.raises(ValueError, match="`chunk_length` must be a multiple of the 4 processes, .* got 6"):
        backward_in_parallel(model, ids, ids, chunk_length=6)
    classifier = build(SumAggForSequenceClassification, sumagg_config("pure", num_labels=3))
    with pytest.raises(ValueError, match="use `backward_in_chunks`"):
        backward_in_parallel(classifier, ids, torch.tensor([0]))


@pytest.mark.slow
def test_processes_compute_the_gradients_of_one(tmp_path):
    mp.spawn(compare, args=(str(tmp_path),), nprocs=4)
