import csv
import json

import pytest
import torch
from peft import PeftConfig
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForImageClassification, AutoModelForSequenceClassification

from modeling_sumagg import ToSTConfig
from modeling_sumagg.modeling_tost import tost_image_processor
from modeling_sumagg.training import LORA_TARGET_MODULES


@pytest.mark.parametrize("family", ["sumagg", "tost_text"])
def test_a_language_model_is_adapted_to_both_tasks(run_script, csv_files, short_run, config_overrides, family, capsys):
    base = run_script(
        "run_clm.py", *short_run, *csv_files, *config_overrides(family), "--block_size", 16, output_dir="base"
    )
    classifier = run_script(
        "run_lora.py", *short_run, *csv_files, "--model_name_or_path", base, "--max_length", 64,
        "--gradient_checkpointing", True, "--bf16", True, "--use_cpu", True, output_dir="classifier",
    )  # fmt: skip
    adapted = run_script(
        "run_lora.py", *short_run, *csv_files, "--model_name_or_path", base, "--block_size", 16,
        "--task", "text-generation", "--learning_rate", 1e-2, output_dir="adapted",
    )  # fmt: skip
    # The script itself compares the reloaded and the merged model with the trained one.
    assert capsys.readouterr().out.count("Saved and reloaded: the adapters") == 2
    assert "accuracy" in "".join(json.loads((classifier / "eval_results.json").read_text()))
    losses = [json.loads((folder / "eval_results.json").read_text())["eval_loss"] for folder in (base, adapted)]
    assert losses[1] < losses[0]
    targets = [PeftConfig.from_pretrained(each).target_modules for each in (adapted, classifier)]
    assert targets == [set(LORA_TARGET_MODULES[family]), {*LORA_TARGET_MODULES[family], "embed_tokens"}]
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


def test_a_regression_is_adapted_to_other_columns(run_script, tmp_path, capsys):
    """The branch of the numbers is a new one; the text's is adapted, and nothing else of it moves."""
    rows = [
        (f"{'villa' if row % 3 else 'ruin'} {row % 5}", row % 7, row % 4, 10 * (row % 3) + row % 7)
        for row in range(60)
    ]
    for split in ("train", "validation"):
        with (tmp_path / f"{split}.csv").open("w", newline="") as file:
            csv.writer(file).writerows([("text", "rooms", "age", "label"), *rows])
    files = ["--train_file", "train.csv", "--validation_file", "validation.csv", "--disable_tqdm", True]
    tiny = json.dumps({"hidden_size": 32, "max_position_embeddings": 16, "head_hidden_sizes": [32, 16]})
    base = run_script(
        "run_multimodal_regression.py", *files, "--numeric_column_names", "rooms", "--config_overrides", tiny,
        "--vocab_size", 300, "--max_steps", 5, output_dir="base",
    )  # fmt: skip
    folder = run_script(
        "run_lora.py", *files, "--task", "multimodal-regression", "--model_name_or_path", base,
        "--numeric_column_names", "rooms", "age", "--num_train_epochs", 20, "--learning_rate", 1e-2,
    )  # fmt: skip
    printed = capsys.readouterr().out
    assert "Saved and reloaded: the adapters" in printed and "ridge on the numbers" in printed
    results = [json.loads((each / "eval_results.json").read_text())["eval_r2"] for each in (base, folder)]
    assert results[1] > results[0] + 0.1
    before, after = load_file(base / "model.safetensors"), load_file(folder / "merged" / "model.safetensors")
    assert after["numeric_branch.feature_dense1.weight"].shape[0] == 2
    changed = {
        name
        for name in before
        if before[name].shape == after[name].shape and not torch.equal(before[name], after[name])
    }
    assert {name for name in changed if not name.startswith("numeric_branch")} == {
        "text_branch.sequence_sum.proj.weight", "text_branch.sequence_sum.dense.weight", "score.weight", "score.bias",
    }  # fmt: skip


@pytest.mark.slow
def test_without_a_checkpoint_a_base_is_trained_with_the_same_precision(run_script, csv_files, short_run, capsys):
    folder = run_script("run_lora.py", *short_run, *csv_files, "--base_steps", 2, "--bf16", True, "--use_cpu", True)
    assert "Saved and reloaded: the adapters" in capsys.readouterr().out
    assert AutoModelForCausalLM.from_pretrained(folder / "base").config.num_hidden_layers == 2
    assert AutoModelForSequenceClassification.from_pretrained(folder / "merged").config.id2label == {
        0: "cat",
        1: "dog",
    }


def test_a_task_without_a_base_names_the_script_that_makes_one(run_script):
    with pytest.raises(ValueError, match=r"--model_name_or_path, such as what run_image_classification.py saved"):
        run_script("run_lora.py", "--task", "image-classification")
