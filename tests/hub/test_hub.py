"""Model cards, and the check of a folder before it is uploaded."""

import shutil
import sys
from pathlib import Path

import pytest
import torch
from checkpoints import save_with_outputs, text_config
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from testing import build, multimodal_config, sumagg_config, tost_config, tost_text_config
from torch import nn

from modeling_sumagg import (
    SumAggForCausalLM,
    SumAggForMultimodalRegression,
    SumAggForSequenceClassification,
    ToSTForCausalLM,
    ToSTForImageClassification,
)
from modeling_sumagg.hub import check_card, create_model_card, decode_state_size, main
from modeling_sumagg.publishing.clean_process import check_files


RUN = {
    "model_id": "user/model",
    "dataset_type": "wikitext",
    "dataset_name": "Wikitext, 2 MB",
    "steps": 100,
    "hyperparameters": {"learning rate": 1e-3, "batch size": 8},
    "metrics": {"perplexity": 12.345, "accuracy": 0.5},
    "baselines": {"feed-forward only": {"perplexity": 23.456, "accuracy": 0.25}},
}


@pytest.mark.parametrize(
    ("model_class", "config", "pipeline_tag", "auto_class", "source"),
    [
        (SumAggForCausalLM, text_config, "text-generation", "AutoModelForCausalLM", "Ekin"),
        (
            SumAggForSequenceClassification,
            text_config,
            "text-classification",
            "AutoModelForSequenceClassification",
            "Ekin",
        ),
        (
            SumAggForMultimodalRegression,
            multimodal_config,
            "tabular-regression",
            "AutoModelForSequenceClassification",
            "Ekin",
        ),
        (ToSTForCausalLM, tost_text_config, "text-generation", "AutoModelForCausalLM", "2412.17810"),
        (
            ToSTForImageClassification,
            tost_config,
            "image-classification",
            "AutoModelForImageClassification",
            "2412.17810",
        ),
    ],
)
def test_the_card_says_what_was_run(tmp_path, model_class, config, pipeline_tag, auto_class, source):
    model = build(model_class, config())
    create_model_card(model, **RUN, limits="Knows no verbs.", hardware="a pocket calculator").save(
        tmp_path / "card.md"
    )
    card = ModelCard.load(tmp_path / "card.md")
    assert card.data.library_name == "transformers"
    assert card.data.license == "apache-2.0"
    assert card.data.pipeline_tag == pipeline_tag
    assert model.config.model_type in card.data.tags
    assert {(r.metric_type, r.metric_value) for r in card.data.eval_results} == {
        ("perplexity", 12.345),
        ("accuracy", 0.5),
    }
    assert {(r.dataset_type, r.task_type) for r in card.data.eval_results} == {("wikitext", pipeline_tag)}
    for text in (
        f'{auto_class}.from_pretrained(\n    "user/model",\n    revision="<commit hash>",\n    trust_remote_code=True',
        "| data | Wikitext, 2 MB |",
        "| optimizer steps | 100 |",
        "| learning rate | 0.001 |\n| batch size | 8 |",
        "| hardware | a pocket calculator |",
        "| | perplexity | accuracy |\n|---|---:|---:|\n| **this model** | 12.35 | 0.5 |\n"
        "| feed-forward only | 23.46 | 0.25 |",
        f"| parameters | {sum(p.numel() for p in model.parameters()):,} |",
        "Knows no verbs.",
        source,
    ):
        assert text in card.text, text
    assert "{{" not in card.text and "{%" not in card.text and "\n\n\n\n" not in card.text
    assert check_card(tmp_path / "card.md")


def test_state_size_is_what_the_cache_holds():
    # 2 summation layers of 16 float32, and 1 attention layer with 2 x 16 float32 a token.
    assert decode_state_size(build(SumAggForCausalLM, sumagg_config("hybrid"))) == (2 * 16 * 4, 2 * 16 * 4)
    assert decode_state_size(build(SumAggForCausalLM, sumagg_config("pure"))) == (2 * 16 * 4, 0)
    # 2 layers of 2 heads of 8 channels: two sums of squares a channel, and one of memberships a head.
    assert decode_state_size(build(ToSTForCausalLM, tost_text_config("pure"))) == (2 * (2 * 16 + 2) * 4, 0)
    assert decode_state_size(build(ToSTForImageClassification, tost_config())) is None


def test_cards_that_would_hide_something_are_refused():
    model = build(SumAggForCausalLM, text_config())
    with pytest.raises(ValueError, match="`metrics` is empty"):
        create_model_card(model, **RUN | {"metrics": {}})
    with pytest.raises(ValueError, match="`baselines` is empty"):
        create_model_card(model, **RUN | {"baselines": {}})
    with pytest.raises(ValueError, match="feed-forward only.*perplexity"):
        create_model_card(model, **RUN | {"baselines": {"feed-forward only": {"perplexity": 1.0}}})


def test_cards_that_lack_something_fail_the_check(tmp_path):
    with pytest.raises(ValueError, match="is missing"):
        check_card(tmp_path / "README.md")
    card = create_model_card(build(SumAggForCausalLM, text_config()), **RUN)
    del card.data.license
    card.save(tmp_path / "README.md")
    with pytest.raises(ValueError, match="no `license`"):
        check_card(tmp_path / "README.md")


def test_the_kept_cards_are_whole():
    for path in (Path(__file__).parents[2] / "hub_cards" / "runs").glob("*.md"):
        assert check_card(path)


def test_files_that_must_not_be_uploaded(tmp_path):
    with pytest.raises(ValueError, match="no config.json"):
        check_files(tmp_path)
    whole = tmp_path / "whole"
    build(SumAggForCausalLM, text_config()).save_pretrained(whole)
    assert check_files(whole)["AutoModel"] == "modeling_sumagg.SumAggModel"
    truncated = shutil.copytree(whole, tmp_path / "truncated")
    weights = (truncated / "model.safetensors").read_bytes()
    (truncated / "model.safetensors").write_bytes(weights[:-1])
    with pytest.raises(ValueError, match="model.safetensors is truncated or corrupted"):
        check_files(truncated)
    torch.save({}, whole / "training_args.bin")
    assert check_files(whole)
    torch.save(nn.Linear(1, 1).state_dict(), whole / "pytorch_model.bin")
    with pytest.raises(ValueError, match="pytorch_model.bin"):
        check_files(whole)


def run_main(folder: Path, monkeypatch) -> None:
    monkeypatch.setattr(sys, "argv", ["modeling_sumagg.hub", str(folder)])
    main()


def test_a_folder_is_checked_in_a_clean_process(tmp_path, monkeypatch, capfd):
    model = build(SumAggForCausalLM, text_config())
    save_with_outputs(model, tmp_path / "model")
    create_model_card(model, **RUN).save(tmp_path / "model" / "README.md")
    run_main(tmp_path / "model", monkeypatch)
    printed = capfd.readouterr().out
    for text in (
        "AutoModelForCausalLM: SumAggForCausalLM",
        "forward: [1, 8, 61]",
        "finite",
        "generate: [",
        "tokenizer: ",
        "card: text-generation, license apache-2.0, perplexity 12.345",
    ):
        assert text in printed, printed


@pytest.mark.slow
def test_weights_that_do_not_fit_and_missing_code_fail_the_check(tmp_path, monkeypatch):
    folder = tmp_path / "model"
    save_with_outputs(build(SumAggForCausalLM, text_config()), folder)
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weights"] = weights.pop("model.norm.weight")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(SystemExit, match="error: .*do not fit.*model.norm.weight"):
        run_main(folder, monkeypatch)
    (folder / "cache.py").unlink()
    with pytest.raises(SystemExit, match="error: .*cache.py"):
        run_main(folder, monkeypatch)
