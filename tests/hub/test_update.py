"""`--update`: old code in a checkpoint folder becomes that of the installed version, whole or not at all."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from checkpoints import auto_map, text_config
from safetensors import safe_open
from safetensors.torch import save_file
from testing import build
from transformers import dynamic_module_utils as dynamic

from modeling_sumagg import SumAggForCausalLM, __version__
from modeling_sumagg.hub import check_folder, create_model_card, main, update_folder
from modeling_sumagg.publishing import new_folder


HEADER = "# From the Python package modeling-sumagg 0.0.9 (Apache-2.0), module modeling_sumagg.{}.\n"
OLD_CODE = {
    "configuration_sumagg": "from transformers import PreTrainedConfig\n\n\n"
    'class SumAggConfig(PreTrainedConfig):\n    model_type = "sumagg"\n',
    "summation_cache": "from transformers import name_of_an_old_version\n",
    "modeling_sumagg": "from transformers import PreTrainedModel\n\nfrom .summation_cache import SummationLayer\n\n\n"
    "class SumAggForCausalLM(PreTrainedModel):\n"
    "    def forward(self, input_ids, past_key_values=None):\n        pass\n",
}


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def old_folder(tmp_path) -> Path:
    """A checkpoint of an older layout, whose code does not load with this version of transformers."""
    folder = tmp_path / "checkpoints" / "model"
    model = build(SumAggForCausalLM, text_config())
    model.save_pretrained(folder)
    create_model_card(
        model,
        model_id="user/model",
        dataset_type="random",
        dataset_name="random tokens",
        steps=1,
        hyperparameters={},
        metrics={"perplexity": 61.0},
        baselines={"uniform": {"perplexity": 61.0}},
    ).save(folder / "README.md")
    for path in folder.glob("*.py"):
        path.unlink()
    for module, source in OLD_CODE.items():
        (folder / f"{module}.py").write_text(HEADER.format(module) + source)
    (folder / "my_notes.py").write_text("class Tokenizer:\n    pass\n")
    (folder / ".git").mkdir()
    (folder / ".git" / "HEAD").write_text("ref: refs/heads/main\n")
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {
        "AutoConfig": "configuration_sumagg.SumAggConfig",
        "AutoModelForCausalLM": "modeling_sumagg.SumAggForCausalLM",
        "AutoModelForMultipleChoice": "summation_cache.Gone",
        "AutoTokenizer": "my_notes.Tokenizer",
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_old_code_is_replaced_and_the_checkpoint_loads_again(old_folder, tmp_path, monkeypatch, capsys):
    with pytest.raises(ImportError, match="name_of_an_old_version"):
        dynamic.get_class_from_dynamic_module("modeling_sumagg.SumAggForCausalLM", str(old_folder))
    before = snapshot(old_folder)
    build(SumAggForCausalLM, text_config()).save_pretrained(tmp_path / "new")
    capsys.readouterr()
    monkeypatch.setattr(sys, "argv", ["modeling_sumagg.hub", "--update", str(old_folder)])
    main()
    printed = capsys.readouterr().out.splitlines()

    after, new = snapshot(old_folder), snapshot(tmp_path / "new")
    code = {name for name in new if name.endswith(".py")}
    gone = {"summation_cache.py"}
    assert after.keys() == (before.keys() | code) - gone
    assert all(after[name] == new[name] for name in code)
    for name in ("model.safetensors", "README.md", "generation_config.json", "my_notes.py", ".git/HEAD"):
        assert after[name] == before[name]
    old_config, config = json.loads(before["config.json"]), json.loads(after["config.json"])
    assert config.pop("auto_map") == auto_map(tmp_path / "new") | {"AutoTokenizer": "my_notes.Tokenizer"}
    old_config.pop("auto_map")
    assert config == old_config

    assert printed[0] == f"{old_folder}: the code of modeling-sumagg 0.0.9 is now that of {__version__}."
    assert {"changed: modeling_sumagg.py", "added: registration.py", "changed: config.json"} <= set(printed)
    assert {line for line in printed if line.startswith("removed")} == {f"removed: {name}" for name in gone}
    assert len(printed) == 1 + len(code | {"config.json"}) + len(gone)
    check_folder(old_folder)
    assert [path.name for path in old_folder.parent.iterdir()] == ["model"]
    main()
    assert capsys.readouterr().out.endswith(f"{old_folder} has the code of the installed version already.\n")


def break_json(folder):
    (folder / "config.json").write_text("{")


def point_elsewhere(folder):
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {name: f"user/repo--{value}" for name, value in config["auto_map"].items()}
    (folder / "config.json").write_text(json.dumps(config))


def edit_config(**changes):
    def edit(folder):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | changes))

    return edit


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda folder: shutil.rmtree(folder), "holds no config.json"),
        (break_json, "is not the config of a model"),
        (edit_config(model_type="gpt2"), "of the type 'gpt2', whose code modeling-sumagg does not know"),
        (edit_config(auto_map=None), "has no `auto_map`"),
        (point_elsewhere, "not in it but in user/repo"),
        (
            lambda folder: (folder / "modeling_sumagg.py").write_text("# theirs\n"),
            "was not written by modeling-sumagg",
        ),
        (lambda folder: (folder / "registration.py").write_text("# mine\n"), "was not written by modeling-sumagg"),
        (lambda folder: (folder / "adapter_config.json").write_text("{}"), "holds an adapter"),
    ],
)
def test_a_folder_that_is_not_ours_is_refused(old_folder, monkeypatch, spoil, reason):
    spoil(old_folder)
    before = snapshot(old_folder)
    monkeypatch.setattr(sys, "argv", ["modeling_sumagg.hub", "--update", str(old_folder)])
    with pytest.raises(SystemExit) as raised:
        main()
    assert raised.value.code.startswith("error: ") and reason in raised.value.code and "\n" not in raised.value.code
    assert snapshot(old_folder) == before


def test_the_current_folder_and_a_file_are_refused(old_folder, monkeypatch):
    monkeypatch.chdir(old_folder)
    with pytest.raises(ValueError, match="the current folder cannot be: run this from another one"):
        update_folder(".")
    with pytest.raises(ValueError, match="config.json is a file"), new_folder.new_folder(old_folder / "config.json"):
        pass


@pytest.mark.parametrize("links", [True, False])
def test_where_folders_cannot_be_exchanged_in_one_step(old_folder, monkeypatch, links):
    monkeypatch.setattr(new_folder, "_exchange", lambda first, second: False)
    if not links:
        monkeypatch.setattr(new_folder.os, "link", None)
        monkeypatch.setattr(new_folder, "_link", lambda a, b: shutil.copy2(a, b, follow_symlinks=False))
    before = snapshot(old_folder)
    update_folder(old_folder)
    after = snapshot(old_folder)
    assert after["model.safetensors"] == before["model.safetensors"]
    assert b"class SumAggModel" in after["modeling_sumagg.py"]
    assert [path.name for path in old_folder.parent.iterdir()] == ["model"]


@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_FSIZE, and folders exchanged in one step")
@pytest.mark.slow
@pytest.mark.parametrize("what", ["update", "convert"])
def test_killed_or_out_of_space_leaves_the_old_folder_or_the_new_one(old_folder, tmp_path, what):
    golden = Path(__file__).parents[1] / "golden" / "sumagg_pure.safetensors"
    with safe_open(golden, framework="pt") as file:
        weights = {key.removeprefix("weights."): file.get_tensor(key) for key in file.keys() if "weights." in key}
    save_file(weights, tmp_path / "original.safetensors")
    script = Path(__file__).parent / "scripts" / "interrupt.py"
    process = subprocess.run(
        [sys.executable, script, what, tmp_path / "original.safetensors", old_folder],
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr[-3000:]
    left = json.loads(process.stdout.splitlines()[-1])
    assert left["broken steps"] == []
    assert left["old"] > 20 and left["new"] > 2 and left["refused"] > 2
