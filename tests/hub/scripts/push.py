"""Push to the Hub with the package: two revisions of a language model, an image classifier, and a third revision."""

import sys
import tempfile
from pathlib import Path

import torch
from huggingface_hub import HfApi
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoTokenizer,
    Trainer,
    TrainingArguments,
)
from transformers.models.auto.image_processing_auto import AutoImageProcessor

import modeling_sumagg  # noqa: F401


root = Path(sys.argv[1])
api = HfApi(token="hf_test")

language_model = root / "SumAggForCausalLM"
model = AutoModelForCausalLM.from_pretrained(language_model)
model.push_to_hub("user/language", token="hf_test")
AutoTokenizer.from_pretrained(language_model).push_to_hub("user/language", token="hf_test")
api.upload_file(path_or_fileobj=root / "card.md", path_in_repo="README.md", repo_id="user/language")
print("revision", api.model_info("user/language").sha)

with torch.no_grad():
    model.lm_head.weight.mul_(2)
with tempfile.TemporaryDirectory() as folder:
    arguments = TrainingArguments(
        folder, hub_model_id="user/language", hub_token="hf_test", report_to=[], use_cpu=True, disable_tqdm=True
    )
    Trainer(model, arguments).push_to_hub()
print("revision", api.model_info("user/language").sha)

image_classifier = root / "ToSTForImageClassification"
AutoModelForImageClassification.from_pretrained(image_classifier).push_to_hub("user/images", token="hf_test")
AutoImageProcessor.from_pretrained(image_classifier).push_to_hub("user/images", token="hf_test")

print("third", flush=True)
sys.stdin.readline()
with torch.no_grad():
    model.lm_head.weight.mul_(2)
model.push_to_hub("user/language", token="hf_test")
