"""What `Trainer` makes of the language models by the names of their classes."""

import pytest
import torch
from testing import build, tiny_config
from torch.nn import functional as F
from transformers import Trainer, TrainingArguments

from modeling_sumagg import SumAggForCausalLM, ToSTForCausalLM


@pytest.mark.parametrize("model_class", [SumAggForCausalLM, ToSTForCausalLM])
def test_smoothed_labels_are_those_of_the_next_token(model_class, tmp_path):
    model = build(model_class, tiny_config(model_class))
    arguments = TrainingArguments(tmp_path, label_smoothing_factor=0.3, use_cpu=True, report_to=[])
    input_ids = torch.randint(61, (2, 9))
    loss = Trainer(model, arguments).compute_loss(model, {"input_ids": input_ids, "labels": input_ids})
    logits = model(input_ids).logits[:, :-1].flatten(0, 1)
    torch.testing.assert_close(loss, F.cross_entropy(logits, input_ids[:, 1:].flatten(), label_smoothing=0.3))
