"""A checkpoint carries its code: into a process without this package, and on from there."""

import shutil

from checkpoints import auto_map, save_every_class
from testing import MODEL_CLASSES


# Of each family one class, and each way of saving: by the model, by the `Trainer` and merged with an adapter.
CARRIED_TWICE = {
    *{cls.config_class: cls.__name__ for cls in MODEL_CLASSES}.values(),
    "SumAggForCausalLM",
    "SumAggForTokenClassification",
}


def test_every_class_is_carried_on_and_on_without_the_package(tmp_path, clean_python, run_script):
    names = save_every_class(tmp_path / "first")
    for source, target in [("first", "second"), ("second", "third")]:
        output = run_script(clean_python, "carry_on.py", tmp_path / source, tmp_path / target, HF_HUB_OFFLINE="1")
        assert output.count(" ok\n") == len(names)
        # What was saved must not need what it was loaded from.
        for path in (tmp_path / source).iterdir():
            if path.is_dir():
                first = {file.name: file.read_bytes() for file in path.glob("sumagg_*.py")}
                again = {file.name: file.read_bytes() for file in (tmp_path / target / path.name).glob("sumagg_*.py")}
                assert first == again
                assert auto_map(path) == auto_map(tmp_path / target / path.name)
        shutil.rmtree(tmp_path / source)
        # The code that is carried on is that of the first round, file for file.
        for name in set(names) - CARRIED_TWICE:
            shutil.rmtree(tmp_path / target / name)
            (tmp_path / target / f"{name}.safetensors").unlink()
        names = CARRIED_TWICE
        shutil.rmtree(tmp_path / "hf_home")
