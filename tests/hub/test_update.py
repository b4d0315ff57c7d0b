"""`update`: old code in a checkpoint folder becomes that of the installed version, and nothing else changes."""

import errno
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from checkpoints import auto_map, text_config
from safetensors import safe_open
from safetensors.torch import save_file
from testing import build
from transformers import dynamic_module_utils as dynamic

from modeling_sumagg import SumAggForCausalLM, __main__, __version__
from modeling_sumagg.publishing import files, update
from modeling_sumagg.publishing.hub import check_folder, create_model_card, update_folder


HEADER = "# From the Python package modeling-sumagg 0.0.9 (Apache-2.0), module modeling_sumagg.{}.\n"
OLD_CODE = {
    "configuration_sumagg": "from transformers import PreTrainedConfig\n\n\n"
    'class SumAggConfig(PreTrainedConfig):\n    model_type = "sumagg"\n',
    "summation_cache": "from transformers import name_of_an_old_version\n",
    "modeling_sumagg": "from transformers import PreTrainedModel\n\nfrom .summation_cache import SummationLayer\n\n\n"
    "class SumAggForCausalLM(PreTrainedModel):\n"
    "    def forward(self, input_ids, past_key_values=None):\n        pass\n",
}
OLD_FILES = {f"{module}.py" for module in OLD_CODE}
# Of them those that a checkpoint still has, with other code.
KEPT = {"configuration_sumagg.py", "modeling_sumagg.py"}


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
    (folder / "cache.py").write_text("# mine\n")
    (folder / ".git").mkdir()
    (folder / ".git" / "HEAD").write_text("ref: refs/heads/main\n")
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {
        "AutoConfig": "configuration_sumagg.SumAggConfig",
        "AutoModelForCausalLM": "modeling_sumagg.SumAggForCausalLM",
        "AutoModelForMultipleChoice": "summation_cache.Gone",
        "AutoTokenizer": ["my_notes.Tokenizer", None],
        "AutoProcessor": "user/repo--processing.Processor",
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_old_code_is_replaced_and_the_checkpoint_loads_again(old_folder, tmp_path, capsys):
    with pytest.raises(ImportError, match="name_of_an_old_version"):
        dynamic.get_class_from_dynamic_module("modeling_sumagg.SumAggForCausalLM", str(old_folder))
    before = snapshot(old_folder)
    build(SumAggForCausalLM, text_config()).save_pretrained(tmp_path / "new")
    capsys.readouterr()
    __main__.main(["update", str(old_folder)])
    printed = capsys.readouterr().out.splitlines()

    after, new = snapshot(old_folder), snapshot(tmp_path / "new")
    code = {name for name in new if name.endswith(".py")}
    assert after.keys() == (before.keys() - OLD_FILES) | code and KEPT <= code
    assert all(after[name] == new[name] for name in code)
    for name in before.keys() - OLD_FILES - {"config.json"}:
        assert after[name] == before[name]
    old_config, config = json.loads(before["config.json"]), json.loads(after["config.json"])
    mine = {"AutoTokenizer": ["my_notes.Tokenizer", None], "AutoProcessor": "user/repo--processing.Processor"}
    assert config.pop("auto_map") == auto_map(tmp_path / "new") | mine
    old_config.pop("auto_map")
    assert config == old_config

    assert printed[0] == f"{old_folder}: the code of modeling-sumagg 0.0.9 is now that of {__version__}."
    assert set(printed[1:]) == {
        *(f"changed: {name}" for name in {"config.json"} | KEPT),
        *(f"added: {name}" for name in code - KEPT),
        *(f"removed: {name}" for name in OLD_FILES - KEPT),
    }
    config["auto_map"] = auto_map(tmp_path / "new")
    (old_folder / "config.json").write_text(json.dumps(config))
    check_folder(old_folder)
    assert [path.name for path in old_folder.parent.iterdir()] == ["model"]
    __main__.main(["update", str(old_folder)])
    assert capsys.readouterr().out.endswith(f"{old_folder} has the code of the installed version already.\n")


def break_json(folder):
    (folder / "config.json").write_text("{")


def point_elsewhere(folder):
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "user/repo--configuration_sumagg.SumAggConfig"}
    (folder / "config.json").write_text(json.dumps(config))


def edit_config(**changes):
    def edit(folder):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | changes))

    return edit


def take_a_name(folder):
    update_folder(shutil.copytree(folder, folder.with_name("other")))
    path = next(folder.with_name("other").glob("sumagg_*_registration.py"))
    (folder / path.name).write_text("# theirs\n")


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda folder: shutil.rmtree(folder), "holds no config.json"),
        (break_json, "config.json is not JSON"),
        (
            lambda folder: (folder / "config.json").write_text("[" * 100_000),
            "config.json is not JSON: maximum recursion",
        ),
        (lambda folder: (folder / "config.json").write_text("[1]"), "must hold a JSON object, got a list"),
        (lambda folder: (folder / "config.json").write_bytes(b"\xff\xfe{}"), "config.json is not JSON"),
        (edit_config(model_type="gpt2"), "of the type 'gpt2', whose code modeling-sumagg does not know"),
        (edit_config(model_type=["sumagg"]), "of the type ['sumagg'], whose code modeling-sumagg does not know"),
        (edit_config(auto_map=None), "has no `auto_map`"),
        (edit_config(auto_map=["x.Y"]), "must map Auto classes to code, got ['x.Y']"),
        (edit_config(auto_map={"AutoConfig": [1, 2]}), "must name `AutoConfig` as 'module.Class'"),
        (edit_config(auto_map={"AutoConfig": "../../x.Y"}), "must name `AutoConfig` as 'module.Class'"),
        (edit_config(auto_map={"AutoConfig": "/etc/passwd.Y"}), "must name `AutoConfig` as 'module.Class'"),
        (edit_config(auto_map={"AutoConfig": "a\0b.Y"}), "must name `AutoConfig` as 'module.Class'"),
        (point_elsewhere, "not in it but in user/repo"),
        (
            lambda folder: (folder / "configuration_sumagg.py").write_text("# theirs\n"),
            "configuration_sumagg.py was not written by modeling-sumagg: there is nothing to update",
        ),
        (take_a_name, "_registration.py was not written by modeling-sumagg and would be overwritten"),
        (lambda folder: (folder / "adapter_config.json").write_text("{}"), "holds an adapter"),
    ],
)
def test_a_folder_that_is_not_ours_is_refused(old_folder, spoil, reason):
    spoil(old_folder)
    before = snapshot(old_folder)
    with pytest.raises(SystemExit) as raised:
        __main__.main(["update", str(old_folder)])
    assert raised.value.code.startswith("error: ") and reason in raised.value.code and "\n" not in raised.value.code
    assert snapshot(old_folder) == before


def test_the_commands_of_0_2_advise_and_run(old_folder, monkeypatch, capsys):
    def run(module: str, *arguments) -> tuple[str, str, str | None]:
        """`python -m module arguments` in this process: what it prints on both streams, and its error."""
        # Another test may have imported it under its old name.
        monkeypatch.delitem(sys.modules, module, raising=False)
        monkeypatch.setattr(sys, "argv", [module, *map(str, arguments)])
        error = None
        try:
            runpy.run_module(module, run_name="__main__")
        except SystemExit as raised:
            error = raised.code
        return *capsys.readouterr(), error

    advice = "`python -m modeling_sumagg.hub` is now `python -m modeling_sumagg {}`.\n"
    out, err, error = run("modeling_sumagg.hub", "--update", old_folder)
    assert err == advice.format("update") and "changed: config.json" in out and error is None
    out, err, error = run("modeling_sumagg.hub", old_folder / "missing")
    assert err == advice.format("check") and error.endswith("missing is missing: give the folder of a checkpoint.")
    converter = "modeling_sumagg.convert_original_checkpoint"
    options = ("--model_family", "tost", "--checkpoint_path", "missing.pth", "--output_dir", old_folder / "new")
    out, err, error = run(converter, *options)
    assert err == f"`python -m {converter}` is now `python -m modeling_sumagg convert`.\n"
    assert error == "error: There is no file missing.pth."


def test_modes_stay_links_are_replaced_and_pipes_are_not_read(old_folder, tmp_path):
    config = tmp_path / "blob"
    (old_folder / "config.json").rename(config)
    (old_folder / "config.json").symlink_to(config)
    config.chmod(0o600)
    before = config.read_bytes()
    os.mkfifo(old_folder / "pipe.py")
    (old_folder / "folder.py").mkdir()
    update_folder(old_folder)
    assert config.read_bytes() == before and not (old_folder / "config.json").is_symlink()
    written = [old_folder / "config.json", *old_folder.glob("sumagg_*.py")]
    assert len(written) > 10 and {path.stat().st_mode & 0o777 for path in written} == {0o600}
    assert (old_folder / "pipe.py").is_fifo() and (old_folder / "folder.py").is_dir()


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root may give files away")
def test_root_leaves_files_to_their_owner(old_folder):
    for path in (old_folder, *old_folder.iterdir()):
        os.chown(path, 1234, 1235)
    update_folder(old_folder)
    owners = {(path.stat().st_uid, path.stat().st_gid) for path in old_folder.iterdir()}
    assert owners == {(1234, 1235)}


def test_a_config_that_is_written_meanwhile_is_not_lost(old_folder, monkeypatch):
    before, write_code = snapshot(old_folder), files.write_code

    def write_and_be_overtaken(folder, sources, like=None):
        edit_config(initializer_range=0.5)(folder)
        return write_code(folder, sources, like)

    monkeypatch.setattr(update, "write_code", write_and_be_overtaken)
    with pytest.raises(ValueError, match="was written by another process meanwhile: run the update again"):
        update_folder(old_folder)
    after = snapshot(old_folder)
    assert json.loads(after.pop("config.json"))["initializer_range"] == 0.5
    before.pop("config.json")
    assert before.items() <= after.items()


def test_a_checkpoint_that_a_training_writes_meanwhile_is_not_lost(old_folder):
    """Files come and go in the folder all the time that it is updated."""
    going, written = threading.Event(), []

    def train():
        while not going.is_set():
            checkpoint = old_folder / f"checkpoint-{len(written)}"
            checkpoint.mkdir()
            (checkpoint / "model.safetensors").write_bytes(bytes(1000))
            written.append(checkpoint.name)

    thread = threading.Thread(target=train)
    thread.start()
    try:
        for _ in range(5):
            for path in old_folder.glob("sumagg_*.py"):
                path.unlink()
            update_folder(old_folder)
    finally:
        going.set()
        thread.join()
    assert len(written) > 5
    assert all((old_folder / name / "model.safetensors").stat().st_size == 1000 for name in written)


def test_two_updates_at_once_end_as_one(old_folder, tmp_path):
    expected = shutil.copytree(old_folder, tmp_path / "expected")
    update_folder(expected)
    barrier, errors = threading.Barrier(2), []

    def run():
        barrier.wait()
        try:
            update_folder(old_folder)
        except ValueError as error:
            errors.append(str(error))

    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(errors) < 2 and all("another process" in error for error in errors)
    assert snapshot(old_folder) == snapshot(expected)


@pytest.mark.parametrize("files_before_it_is_full", [0, 3, -1])
def test_a_full_disk_leaves_the_old_folder(old_folder, monkeypatch, files_before_it_is_full):
    before, replace, left = snapshot(old_folder), os.replace, [files_before_it_is_full]

    def replace_while_there_is_room(source, target):
        last = Path(target).name == "config.json"
        left[0] -= 1
        if left[0] == -1 or (files_before_it_is_full < 0 and last):
            raise OSError(errno.ENOSPC, "No space left on device")
        return replace(source, target)

    monkeypatch.setattr(os, "replace", replace_while_there_is_room)
    with pytest.raises(OSError, match="No space left on device"):
        update_folder(old_folder)
    assert before.items() <= snapshot(old_folder).items()
    monkeypatch.undo()
    update_folder(old_folder)
    assert not (OLD_FILES - KEPT) & snapshot(old_folder).keys()


@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_FSIZE")
@pytest.mark.slow
@pytest.mark.parametrize("what", ["update", "save", "convert"])
def test_killed_or_out_of_space_leaves_old_or_new(old_folder, tmp_path, what):
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
    assert left["old"] > 20 and left["new"] > 2 and left["refused"] > 0, left


def test_the_names_of_files_are_of_no_other_package(old_folder):
    update_folder(old_folder)
    assert all(
        re.fullmatch(r"sumagg_[0-9a-f]{6}_\w+\.py", path.name)
        for path in old_folder.glob("*.py")
        if path.name not in {"my_notes.py", "cache.py"} | KEPT
    )
