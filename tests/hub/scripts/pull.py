"""Pull from the Hub without the package: both revisions side by side, the tokenizer, the card and the images."""

import sys
from pathlib import Path

import torch
from huggingface_hub import ModelCard, hf_hub_download
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoBackbone, AutoModelForCausalLM, AutoTokenizer, pipeline


assert "modeling_sumagg" not in sys.modules
root, first, second = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
recorded = load_file(root / "SumAggForCausalLM.safetensors")


def logits(model):
    with torch.no_grad():
        return model(recorded["input_ids"]).logits


models = {
    revision: AutoModelForCausalLM.from_pretrained("user/language", revision=revision, trust_remote_code=True)
    for revision in (second, first, "main")
}
assert len({type(model) for model in models.values()}) == 2
torch.testing.assert_close(logits(models[first]), recorded["output"], rtol=1e-5, atol=1e-6)
torch.testing.assert_close(logits(models[second]), 2 * recorded["output"], rtol=1e-5, atol=1e-5)
torch.testing.assert_close(logits(models["main"]), logits(models[second]), rtol=1e-5, atol=1e-6)
for revision in (first, second, first):
    tokens = models[revision].generate(recorded["input_ids"], max_new_tokens=3, do_sample=False)
    assert tokens.shape == (2, 10)

tokenizer = AutoTokenizer.from_pretrained("user/language", revision=first, trust_remote_code=True)
assert tokenizer("w0 w1")["input_ids"] == [3, 4]
card = ModelCard.load(hf_hub_download("user/language", "README.md", revision=first))
assert (card.data.library_name, card.data.pipeline_tag) == ("transformers", "text-generation")
assert card.data.eval_results[0].metric_value == 61.0
classify = pipeline("image-classification", "user/images", trust_remote_code=True)
assert len(classify(Image.new("RGB", (40, 30), "red"))) == 3
backbone = AutoBackbone.from_pretrained("user/images", trust_remote_code=True)
assert backbone(torch.zeros(1, 3, 16, 16)).feature_maps[-1].shape == (1, 16, 2, 2)

# Pulled by revision, changed, pushed elsewhere: it must carry its code, not point to where it came from.
models[first].push_to_hub("user/again", token="hf_test")
again = AutoModelForCausalLM.from_pretrained("user/again", trust_remote_code=True)
torch.testing.assert_close(logits(again), recorded["output"], rtol=1e-5, atol=1e-6)
print("ok")
