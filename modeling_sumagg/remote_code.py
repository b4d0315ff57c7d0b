"""Self-contained checkpoints: the code of a model family, written flat beside the weights.

transformers loads the code of a checkpoint from one folder of modules that import each other as `from .name import …`.
What is written here is our own source with its relative imports flattened to that form and, at its end, the classes
registered by `register_for_auto_class`: transformers itself then carries the code on when such a model is saved again.
"""

import ast
import functools
import importlib.metadata
import importlib.util
import os
import re
from pathlib import Path

from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.utils import CONFIG_NAME


HEADER = """\
# From the Python package modeling-sumagg {version} (Apache-2.0), module {module}.
# Written beside the checkpoint so that it loads with `trust_remote_code=True` where the package is not installed: the
# source unchanged but for this header, its relative imports, which name the modules of this folder, and the classes
# that it registers at its end, if any, so that the code is carried on when the model is saved again.
"""


def register_family(config_class: type[PreTrainedConfig], models: dict[type, type[PreTrainedModel]]) -> None:
    """
    Register a model family with the Auto classes, and make its checkpoints self-contained.

    From then on a config of exactly this class writes the modules of the family and the `auto_map` wherever a
    `config.json` is saved: by `save_pretrained` and `push_to_hub` of a model or a config, and by `Trainer`.

    Args:
        config_class (`type[PreTrainedConfig]`): the config of the family.
        models (`dict[type, type[PreTrainedModel]]`): for each Auto class, the model it makes of such a config.
    """
    AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
    for auto_class, model_class in models.items():
        auto_class.register(config_class, model_class, exist_ok=True)
        # Pipelines, and `Trainer` where it smooths labels, know the task of a class by its name in this table alone.
        auto_class._model_mapping._model_mapping[config_class.model_type] = model_class.__name__
    classes = {"AutoConfig": config_class} | {auto_class.__name__: model for auto_class, model in models.items()}
    write_json = config_class.to_json_file

    # `save_pretrained` takes stock of the folder first and uploads what changes after that; this is called in between.
    @functools.wraps(write_json)
    def to_json_file(self, json_file_path: str | os.PathLike, use_diff: bool = True):
        path = Path(json_file_path)
        if type(self) is config_class and path.name == CONFIG_NAME:
            for name, source in flat_sources(tuple(classes.items())).items():
                (path.parent / name).write_text(source, encoding="utf-8")
            auto_map = {key: f"{cls.__module__.rpartition('.')[2]}.{cls.__name__}" for key, cls in classes.items()}
            self.auto_map = {**(getattr(self, "auto_map", None) or {}), **auto_map}
        write_json(self, json_file_path, use_diff=use_diff)

    config_class.to_json_file = to_json_file


@functools.cache
def flat_sources(classes: tuple[tuple[str, type], ...]) -> dict[str, str]:
    """
    The modules of some classes, and every module of this package that they import, directly or not, for one flat folder.

    Args:
        classes (`tuple[tuple[str, type], ...]`): the name of an Auto class and the class it finds, one pair for each.

    Returns:
        `dict[str, str]`: the text of each file by its name.

    Raises:
        `ValueError`: a module imports from a package instead of a module, or two modules have the same last name.
    """
    version = importlib.metadata.version("modeling-sumagg")
    sources: dict[str, str] = {}
    origin: dict[str, str] = {}
    waiting = [cls.__module__ for _, cls in classes]
    while waiting:
        module = waiting.pop()
        name = module.rpartition(".")[2] + ".py"
        if origin.setdefault(name, module) != module:
            raise ValueError(f"{origin[name]} and {module} would both be written to {name}: rename one of them.")
        if name not in sources:
            source, imported = flatten_imports(importlib.util.find_spec(module).loader.get_source(module), module)
            registered = [
                f'{cls.__name__}.register_for_auto_class("{key}")\n'
                for key, cls in classes
                if cls.__module__ == module
            ]
            ending = ["\n\n", *registered] if registered else []
            sources[name] = "".join([HEADER.format(version=version, module=module), source, *ending])
            waiting += imported
    return sources


def flatten_imports(source: str, module: str) -> tuple[str, list[str]]:
    """
    Rewrite the relative imports of a module to name files of one folder, `from .ops.name import x` to
    `from .name import x`, and keep each block of them in alphabetical order.

    Args:
        source (`str`): the text of the module.
        module (`str`): its full name.

    Returns:
        `tuple[str, list[str]]`: the new text, and the full names of the modules imported.

    Raises:
        `ValueError`: an import from a package instead of a module (`from . import x`).
    """
    tree = ast.parse(source)
    lines = source.splitlines(keepends=True)
    imported, imports = [], []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level > 0:
            target = importlib.util.resolve_name("." * node.level + (node.module or ""), module.rpartition(".")[0])
            if importlib.util.find_spec(target).submodule_search_locations is not None:
                raise ValueError(
                    f"{module}, line {node.lineno}, imports from the package {target}, which a flat folder does not "
                    "have: import from the module itself."
                )
            imported.append(target)
            if node in tree.body:
                imports.append(node)
            first = node.lineno - 1
            lines[first] = re.sub(r"from\s+\.[\w.]*", f"from .{target.rpartition('.')[2]}", lines[first], count=1)

    blocks: list[list[ast.ImportFrom]] = []
    for node in imports:
        if blocks and blocks[-1][-1].end_lineno == node.lineno - 1:
            blocks[-1].append(node)
        else:
            blocks.append([node])
    for nodes in blocks:
        texts = ["".join(lines[node.lineno - 1 : node.end_lineno]) for node in nodes]
        ordered = "".join(sorted(texts, key=lambda text: text.split()[1]))
        lines[nodes[0].lineno - 1 : nodes[-1].end_lineno] = ordered.splitlines(keepends=True)
    return "".join(lines), imported
