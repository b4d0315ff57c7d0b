"""What has cut a sequence between processes, where each would begin with an empty state, is refused before any number."""

import pytest
import torch
from accelerate import Accelerator, ParallelismConfig
from accelerate.state import AcceleratorState
from testing import MODEL_CLASSES, build, tiny_config, tiny_inputs
from transformers import GPT2Config, GPT2LMHeadModel

from modeling_sumagg import SumAggForCausalLM, ToSTTextModel


@pytest.fixture(params=["sp_size", "cp_size"])
def sequence_parallelism(request):
    AcceleratorState._reset_state(True)
    state = Accelerator(cpu=True).state
    state.parallelism_config = ParallelismConfig(**{request.param: 2})
    yield state
    AcceleratorState._reset_state(True)


@pytest.mark.parametrize("model_class", [cls for cls in MODEL_CLASSES if not cls.__name__.startswith("ToST")])
def test_sequence_parallelism_is_refused_before_the_first_step(model_class, sequence_parallelism):
    model = build(model_class, tiny_config(model_class, "hybrid"))
    inputs = tiny_inputs(model)
    with pytest.raises(
        ValueError, match="`[sc]p_size=2` .* is for models of full attention alone.* use .*backward_in_parallel"
    ):
        model(**inputs)
    sequence_parallelism.parallelism_config = ParallelismConfig(sp_size=1)
    model(**inputs)


def test_of_token_statistics_compiled_and_of_windows(sequence_parallelism):
    ids = torch.randint(61, (2, 9))
    model = build(ToSTTextModel, tiny_config(ToSTTextModel, "pure"))
    with pytest.raises(ValueError, match="`[sc]p_size=2`"):
        torch.compile(model, backend="eager")(ids)
    windows = build(SumAggForCausalLM, tiny_config(SumAggForCausalLM, layer_types=["sliding_attention"] * 3))
    with pytest.raises(ValueError, match="`[sc]p_size=2`"):
        windows(ids)
    # Attention gathers the parts.
    attends = build(SumAggForCausalLM, tiny_config(SumAggForCausalLM, layer_types=["full_attention"] * 3))
    attends(ids, position_ids=torch.arange(9, 18)[None])


@pytest.mark.parametrize("model_class", [SumAggForCausalLM, ToSTTextModel])
def test_the_part_of_another_process_is_refused(model_class):
    """Of two processes that share a sequence the second is given tokens and positions from the middle."""
    model = build(model_class, tiny_config(model_class)).train()
    ids, position_ids = torch.randint(61, (2, 12)), torch.arange(12).expand(2, -1)
    model(ids[:, :6], position_ids=position_ids[:, :6])
    with pytest.raises(ValueError, match="begin at 6, in the middle of a document"):
        model(ids[:, 6:], position_ids=position_ids[:, 6:])


def test_accelerate_refuses_context_parallelism_when_it_prepares_a_model():
    from accelerate.big_modeling import _attach_context_parallel_hooks

    with pytest.raises(ValueError, match=r"does not support attention layers of type \['summation'\]"):
        _attach_context_parallel_hooks(build(SumAggForCausalLM, tiny_config(SumAggForCausalLM, "pure")))


def test_padding_predicts_the_first_token_in_models_of_transformers_too():
    """The loss with a label after padding on the left is not that without it, here and in GPT-2."""
    ids = torch.randint(1, 61, (1, 8))
    mask = (torch.arange(8) >= 3).long()[None]
    labels = ids.masked_fill(mask == 0, -100)
    without_first = labels.clone()
    without_first[0, 3] = -100
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=61, n_embd=16, n_layer=1, n_head=2, n_positions=8))
    for model in (gpt2.eval(), build(SumAggForCausalLM, tiny_config(SumAggForCausalLM, "pure"))):
        losses = [model(ids, attention_mask=mask, labels=kept).loss for kept in (labels, without_first)]
        logits = model(ids, attention_mask=mask).logits
        expected = torch.nn.functional.cross_entropy(logits[0, 2:7], ids[0, 3:], reduction="none")
        torch.testing.assert_close(torch.stack(losses), torch.stack([expected.mean(), expected[1:].mean()]))
