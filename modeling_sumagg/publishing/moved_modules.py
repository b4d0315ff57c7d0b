"""The module names of 0.2, which keep working in 0.3: importing one warns and gives the module under its new name."""

import importlib
import importlib.abc
import importlib.util
import sys
import warnings
from importlib.machinery import ModuleSpec
from types import CodeType, ModuleType


PACKAGE = __name__.partition(".")[0]
MOVED = {
    "audio": "streams.audio",
    "baselines": "training.baselines",
    "compatibility": "common.compatibility",
    "convert_original_checkpoint": "publishing.conversion",
    "data_collator": "training.data_collator",
    "embedded_data": "training.embedded_data",
    "families": "models.families",
    "hub": "publishing.hub",
    "modeling_sumagg": "models.modeling_sumagg",
    "modeling_sumagg_multimodal": "models.modeling_sumagg_multimodal",
    "modeling_sumagg_speech": "models.modeling_sumagg_speech",
    "modeling_tost": "models.modeling_tost",
    "modeling_tost_text": "models.modeling_tost_text",
    "ops.summation": "ops",
    "ops.token_statistics.formula": "ops",
    "ops.token_statistics.operators": "ops",
    "plots": "training.plots",
    "publishing.saved_states": "streams.saved_states",
    "scripts": "training.scripts",
    "speech_stream": "streams.speech_stream",
    "spoken_data": "training.spoken_data",
    "text_stream": "streams.text_stream",
}


class MovedModuleFinder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds the modules of [`MOVED`] under their old names."""

    def find_spec(self, fullname, path, target=None) -> ModuleSpec | None:
        package, _, name = fullname.partition(".")
        if package != PACKAGE or name not in MOVED:
            return None
        return importlib.util.spec_from_loader(fullname, self)

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        new_name = f"{PACKAGE}.{MOVED[spec.name.partition('.')[2]]}"
        warnings.warn(f"`{spec.name}` is now `{new_name}`. Change the import.", FutureWarning, stacklevel=2)
        module = importlib.import_module(new_name)
        spec.loader_state = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        # The module has run already; the import system has just given it the spec of the old name.
        module.__spec__ = module.__spec__.loader_state

    def get_code(self, fullname: str) -> CodeType:
        """The code that `python -m` runs under an old name: today's commands, which know the old ones by their names."""
        return importlib.util.find_spec(f"{PACKAGE}.__main__").loader.get_code(f"{PACKAGE}.__main__")


sys.meta_path.append(MovedModuleFinder())
