"""Load a family that is not of the package where neither it nor the package can be imported."""

import sys

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM


folder = sys.argv[1]
recorded = load_file(f"{folder}.safetensors")
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
assert not {"modeling_sumagg", "gated_sum", "gates"} & set(sys.modules)
with torch.no_grad():
    torch.testing.assert_close(model(recorded["input_ids"]).logits, recorded["output"], rtol=1e-5, atol=1e-6)
model.save_pretrained(sys.argv[2])
again = AutoModelForCausalLM.from_pretrained(sys.argv[2], trust_remote_code=True).eval()
with torch.no_grad():
    assert torch.equal(again(recorded["input_ids"]).logits, model(recorded["input_ids"]).logits)
adapted = get_peft_model(model, LoraConfig())
assert {name.split(".lora_A")[0].split(".")[-1] for name, _ in adapted.named_parameters() if "lora_A" in name} == {
    "gate_proj"
}
print("ok")
