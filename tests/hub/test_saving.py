"""Saving and loading where the package is installed: every hook, shards, dtypes, meta, versions side by side."""

import builtins
import json
import os
import shutil

import pytest
import torch
from checkpoints import auto_map, auto_map_of, code_file, code_modules, save_with_outputs, text_config
from peft import LoraConfig, get_peft_model
from safetensors import SafetensorError, safe_open
from testing import assert_close, build, tost_config, tost_text_config
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    DynamicCache,
    Trainer,
    TrainingArguments,
)
from transformers import dynamic_module_utils as dynamic

from modeling_sumagg import SumAggForCausalLM, ToSTForCausalLM, ToSTForImageClassification
from modeling_sumagg.publishing.hub import check_output_dir


INPUT_IDS = torch.arange(3, 15)[None]


def tensor_names(folder) -> list[str]:
    names = []
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            names += file.keys()
    return sorted(names)


def test_every_way_of_saving_writes_the_code(tmp_path):
    model = build(SumAggForCausalLM, text_config())
    model.config.save_pretrained(tmp_path / "config")
    rows = [{"input_ids": INPUT_IDS[0], "labels": INPUT_IDS[0]}] * 2
    arguments = TrainingArguments(tmp_path / "trainer", max_steps=2, save_steps=1, report_to=[], use_cpu=True)
    trainer = Trainer(model, arguments, train_dataset=rows)
    trainer.train()
    trainer.save_model(tmp_path / "saved")
    adapted = get_peft_model(model, LoraConfig(target_modules=["q_proj", "in_proj"], init_lora_weights=False))
    adapted.save_pretrained(tmp_path / "adapter")
    adapted.merge_and_unload().save_pretrained(tmp_path / "merged")

    expected = {path.name for path in (tmp_path / "config").glob("*.py")}
    assert {"modeling_sumagg", "configuration_sumagg", "registration", "recurrence"} <= code_modules(
        tmp_path / "config"
    )
    for folder in ("trainer/checkpoint-1", "trainer/checkpoint-2", "saved", "merged"):
        assert {path.name for path in (tmp_path / folder).glob("*.py")} == expected
        assert auto_map(tmp_path / folder) == auto_map_of(
            tmp_path / folder,
            AutoConfig="configuration_sumagg.SumAggConfig",
            AutoModel="modeling_sumagg.SumAggModel",
            AutoModelForCausalLM="modeling_sumagg.SumAggForCausalLM",
            AutoModelForMaskedLM="modeling_sumagg.SumAggForMaskedLM",
            AutoModelForSequenceClassification="modeling_sumagg.SumAggForSequenceClassification",
            AutoModelForTokenClassification="modeling_sumagg.SumAggForTokenClassification",
        )
    assert not list((tmp_path / "adapter").glob("*.py"))
    model.config.to_json_file(tmp_path / "preset.json")
    assert not list(tmp_path.glob("*.py"))


@pytest.mark.parametrize("trust_remote_code", [None, False, True])
def test_the_installed_classes_are_used_without_a_prompt(tmp_path, monkeypatch, trust_remote_code):
    monkeypatch.setattr(builtins, "input", lambda *_: pytest.fail("a prompt"))
    build(SumAggForCausalLM, text_config()).save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=trust_remote_code)
    assert type(model) is SumAggForCausalLM


def test_shards_dtypes_devices_and_tied_weights(tmp_path):
    model = build(SumAggForCausalLM, text_config())
    expected = model(INPUT_IDS).logits
    model.save_pretrained(tmp_path, max_shard_size="8KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert not [path for path in tmp_path.iterdir() if path.suffix in {".bin", ".pt"}]
    names = tensor_names(tmp_path)
    assert "lm_head.weight" not in names and names.count("model.embed_tokens.weight") == 1

    again = AutoModelForCausalLM.from_pretrained(tmp_path, device_map={"": "cpu"})
    assert again.lm_head.weight is again.model.embed_tokens.weight
    torch.testing.assert_close(again(INPUT_IDS).logits, expected, rtol=1e-5, atol=1e-6)
    half = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}
    half.save_pretrained(tmp_path / "half")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "half", dtype="auto").dtype == torch.bfloat16
    with torch.device("meta"):
        meta = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path))
    assert {parameter.device.type for parameter in meta.parameters()} == {"meta"}
    meta.load_state_dict(model.state_dict(), assign=True)
    torch.testing.assert_close(meta.eval()(INPUT_IDS).logits, expected, rtol=1e-5, atol=1e-6)


def test_one_checkpoint_loads_as_every_head(tmp_path):
    model = build(SumAggForCausalLM, text_config())
    model.save_pretrained(tmp_path)
    body = AutoModel.from_pretrained(tmp_path)
    torch.testing.assert_close(
        body(INPUT_IDS).last_hidden_state, model.model(INPUT_IDS).last_hidden_state, rtol=1e-5, atol=1e-6
    )
    classifier, info = AutoModelForSequenceClassification.from_pretrained(
        tmp_path, num_labels=3, output_loading_info=True
    )
    assert all(key.startswith(("score.", "pooler.")) for key in info["missing_keys"])
    torch.testing.assert_close(
        classifier.model(INPUT_IDS).last_hidden_state, body(INPUT_IDS).last_hidden_state, rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize(
    ("model_class", "config"),
    [
        (SumAggForCausalLM, text_config),
        (ToSTForCausalLM, tost_text_config),
    ],
)
def test_versions_side_by_side(tmp_path, model_class, config):
    """The package and two other versions of the code, from folders of the same name, in one process."""
    installed = build(model_class, config())
    installed.save_pretrained(tmp_path / "first" / "model")
    shutil.copytree(tmp_path / "first" / "model", tmp_path / "second" / "model")
    heads = code_file(tmp_path / "second" / "model", "heads")
    source = heads.read_text()
    assert "model.lm_head(" in source
    heads.write_text(source.replace("model.lm_head(", "-model.lm_head("))

    folders = {"first": tmp_path / "first" / "model", "second": tmp_path / "second" / "model"}
    reference = auto_map(folders["first"])["AutoModelForCausalLM"]
    models = {
        name: dynamic.get_class_from_dynamic_module(reference, str(folder)).from_pretrained(folder).eval()
        for name, folder in folders.items()
    }
    models["installed"] = installed
    assert len({type(model) for model in models.values()}) == 3
    expected = installed(INPUT_IDS).logits
    tokens = {}
    for name in ("second", "installed", "first", "second", "installed"):
        model = models[name]
        torch.testing.assert_close(
            model(INPUT_IDS).logits, -expected if name == "second" else expected, rtol=1e-5, atol=1e-6
        )
        for implementation in ("dynamic", "static"):
            tokens[name, implementation] = model.generate(
                INPUT_IDS, max_new_tokens=6, do_sample=False, cache_implementation=implementation, eos_token_id=None
            )
        # Layer types are registered for the whole process: these layers are those of whichever code came last.
        cache = DynamicCache(config=model.config)
        step = [model(INPUT_IDS[:, :5], cache=cache), model(INPUT_IDS[:, 5:], cache=cache)]
        logits = torch.cat([output.logits for output in step], dim=1)
        assert_close(logits, -expected if name == "second" else expected)
    assert torch.equal(tokens["first", "dynamic"], tokens["installed", "dynamic"])
    assert torch.equal(tokens["first", "static"], tokens["installed", "static"])
    assert not torch.equal(tokens["second", "dynamic"], tokens["first", "dynamic"])


def test_broken_checkpoints_are_refused(tmp_path):
    whole = tmp_path / "whole"
    save_with_outputs(build(SumAggForCausalLM, text_config()), whole)
    load = dynamic.get_class_from_dynamic_module

    def broken(name: str):
        return shutil.copytree(whole, tmp_path / name)

    folder = broken("truncated")
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    with pytest.raises((SafetensorError, OSError), match="(?i)incomplete|cover|metadata|header"):
        AutoModelForCausalLM.from_pretrained(folder)

    folder = broken("corrupted")
    (folder / "model.safetensors").write_bytes(b"\xff" * 64 + weights[64:])
    with pytest.raises((SafetensorError, OSError), match="(?i)header"):
        AutoModelForCausalLM.from_pretrained(folder)

    folder = broken("unknown value")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"norm_position": "middle"}))
    with pytest.raises(Exception, match="norm_position") as raised:
        AutoModelForCausalLM.from_pretrained(folder)
    assert "middle" in str(raised.value)

    folder = broken("missing module")
    code_file(folder, "recurrence").unlink()
    with pytest.raises(OSError, match="recurrence.py"):
        load(auto_map(folder)["AutoModelForCausalLM"], str(folder))


def test_image_models_are_saved_like_the_others(tmp_path):
    build(ToSTForImageClassification, tost_config()).save_pretrained(tmp_path)
    assert auto_map(tmp_path) == auto_map_of(
        tmp_path,
        AutoConfig="configuration_tost.ToSTConfig",
        AutoModel="modeling_tost.ToSTModel",
        AutoModelForImageClassification="modeling_tost.ToSTForImageClassification",
        AutoBackbone="modeling_tost.ToSTBackbone",
    )


OTHERS_FILES = ["model.py", "cache.py", "layers.py", "heads.py", "scan.py", "modeling.py", "README.md"]


def test_files_of_others_stay_and_old_code_goes(tmp_path):
    for name in OTHERS_FILES:
        (tmp_path / name).write_text("# mine\n")
    text_config().save_pretrained(tmp_path)
    assert all((tmp_path / name).read_text() == "# mine\n" for name in OTHERS_FILES)
    code = code_file(tmp_path, "registration")
    old = tmp_path / "sumagg_012345_cache.py"
    old.write_text(code.read_text())
    (tmp_path / "sumagg_012345_mine.py").write_text("# mine\n")
    text_config().save_pretrained(tmp_path)
    assert not old.exists() and (tmp_path / "sumagg_012345_mine.py").exists()

    code.write_text("# mine\n")
    before = (tmp_path / "config.json").read_bytes()
    with pytest.raises(
        ValueError, match=f"{code.name} was not written by modeling-sumagg and would be overwritten: move"
    ):
        build(SumAggForCausalLM, text_config(initializer_range=0.5)).save_pretrained(tmp_path)
    assert code.read_text() == "# mine\n" and (tmp_path / "config.json").read_bytes() == before


def test_code_that_is_the_same_is_not_written_again(tmp_path):
    text_config().save_pretrained(tmp_path)
    times = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.py")}
    text_config().save_pretrained(tmp_path)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.py")} == times


def write(folder, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("mine")


def test_folders_that_a_run_may_write_to(tmp_path):
    assert check_output_dir(tmp_path / "new" / "folder") is False and not (tmp_path / "new").exists()
    write(tmp_path / "project", "train.py", "model.py", "cache.py", ".gitattributes", "data/README.md")
    assert check_output_dir(tmp_path / "project") is False
    text_config().save_pretrained(tmp_path / "saved")
    assert check_output_dir(tmp_path / "saved") is True
    write(tmp_path / "run", "checkpoint-5/trainer_state.json", "training.png")
    assert check_output_dir(tmp_path / "run") is True
    (tmp_path / "saved" / "README.md").write_text("---\nlicense: mit\n---\n")
    assert check_output_dir(tmp_path / "saved") is True


@pytest.mark.parametrize(
    ("names", "reason"),
    [
        (["README.md", "train.py"], "holds README.md, which no training run wrote"),
        (
            ["tokenizer.json", "training.png", "model.safetensors"],
            "model.safetensors, tokenizer.json, training.png, which",
        ),
        (["config.json"], "holds config.json, which"),
        (["sumagg_012345_cache.py"], "holds sumagg_012345_cache.py, which"),
    ],
)
def test_a_folder_with_files_that_a_run_would_overwrite_is_refused(tmp_path, names, reason):
    write(tmp_path, *names)
    with pytest.raises(ValueError, match=f"{reason}.*choose another folder, or move what it holds away"):
        check_output_dir(tmp_path)


def test_a_readme_of_a_project_beside_a_model_is_not_overwritten(tmp_path):
    text_config().save_pretrained(tmp_path)
    write(tmp_path, "README.md")
    with pytest.raises(ValueError, match="holds README.md, which"):
        check_output_dir(tmp_path)


def test_what_is_no_folder_or_cannot_be_written_is_refused(tmp_path, monkeypatch):
    write(tmp_path, "file")
    for path in (tmp_path / "file", tmp_path / "file" / "inside"):
        with pytest.raises(ValueError, match="file is a file and not a folder"):
            check_output_dir(path)
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(ValueError, match="cannot be written to: change its permissions"):
        check_output_dir(tmp_path / "new")


@pytest.mark.parametrize("text", ["{}", '{"database": "x"}', "[1]", "no json"])
def test_saving_replaces_no_config_of_a_project(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(
        ValueError, match=r"config\.json is not the config of a model and would be overwritten: move it"
    ):
        build(SumAggForCausalLM, text_config()).save_pretrained(tmp_path)
    assert (tmp_path / "config.json").read_text() == text and len(list(tmp_path.iterdir())) == 1
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    text_config().save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "sumagg"
