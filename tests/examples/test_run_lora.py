import json

import pytest
from peft import PeftConfig
from transformers import AutoModelForCausalLM, AutoModelForImageClassification, AutoModelForSequenceClassification

from modeling_sumagg import ToSTConfig
from modeling_sumagg.modeling_tost import tost_image_processor


@pytest.mark.parametrize("family", ["sumagg", "tost_text"])
def test_a_language_model_is_adapted_to_both_tasks(run_script, csv_files, short_run, config_overrides, family, capsys):
    base = run_script(
        "run_clm.py", *short_run, *csv_files, *config_overrides(family), "--block_size", 16, output_dir="base"
    )
    classifier = run_script(
        "run_lora.py", *short_run, *csv_files, "--model_name_or_path", base, "--max_length", 64,
        "--gradient_checkpointing", True, output_dir="classifier",
    )  # fmt: skip
    adapted = run_script(
        "run_lora.py", *short_run, *csv_files, "--model_name_or_path", base, "--max_length", 16,
        "--task", "text-generation", "--learning_rate", 1e-2, output_dir="adapted",
    )  # fmt: skip
    # The script itself compares the reloaded and the merged model with the trained one.
    assert capsys.readouterr().out.count("Saved and reloaded: the adapters") == 2
    assert "accuracy" in "".join(json.loads((classifier / "eval_results.json").read_text()))
    losses = [json.loads((folder / "eval_results.json").read_text())["eval_loss"] for folder in (base, adapted)]
    assert losses[1] < losses[0]
    assert PeftConfig.from_pretrained(classifier).target_modules == PeftConfig.from_pretrained(adapted).target_modules
    model = AutoModelForSequenceClassification.from_pretrained(classifier / "merged")
    assert model.config.id2label == {0: "cat", 1: "dog"}
    assert AutoModelForCausalLM.from_pretrained(adapted / "merged").config.model_type == family


def test_an_image_classifier_is_adapted(run_script, tmp_path, capsys):
    config = ToSTConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, patch_size=8, image_size=16, num_labels=10
    )
    AutoModelForImageClassification.from_config(config).save_pretrained(tmp_path / "base")
    tost_image_processor(config).save_pretrained(tmp_path / "base")
    folder = run_script(
        "run_lora.py", "--task", "image-classification", "--model_name_or_path", tmp_path / "base", "--max_steps", 5,
        "--disable_tqdm", True,
    )  # fmt: skip
    assert "Saved and reloaded: the adapters" in capsys.readouterr().out
    assert "eval_accuracy" in json.loads((folder / "eval_results.json").read_text())
