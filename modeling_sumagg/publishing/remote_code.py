"""Self-contained checkpoints: the code of a model family, written flat beside the weights.

transformers loads the code of a checkpoint from one folder of modules that import each other as `from .name import …`.
What is written here is the source itself with its imports flattened to that form and, at its end, the registering of
its classes: what works with the package works without it, and transformers carries the code on when such a model is
saved again.
"""

import ast
import functools
import importlib.metadata
import importlib.util
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path

import transformers
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

# transformers 5.17 takes the top-level name away where torchvision is missing, though it needs none.
from transformers.models.auto.image_processing_auto import AutoImageProcessor
from transformers.utils import CONFIG_NAME, is_vision_available

from ..families import FAMILIES, Family
from ..registration import register_class_names, register_lora_target_modules


PACKAGE = __name__.partition(".")[0]
REGISTRATION = register_class_names.__module__
HEADER = """\
# From the Python package {origin}, module {module}.
# The source but for its imports of modules of this folder, and what it registers at its end (`trust_remote_code=True`).
"""
HEADER_PATTERN = re.compile(r"# From the Python package .*modeling-sumagg ([^ ,]+).*, module ([\w.]+)\.$")


def register_family(
    config_class: type[PreTrainedConfig],
    models: dict[str, type[PreTrainedModel]],
    *,
    lora_target_modules: Sequence[str] = (),
    **facts,
) -> Family:
    """
    Register a model family with the Auto classes, and make its checkpoints self-contained.

    From then on a config of exactly this class writes the modules of the family and the `auto_map` wherever a
    `config.json` is saved: by `save_pretrained` and `push_to_hub` of a model or a config, and by `Trainer`. The modules
    are those of the classes and all that they import from this package, from their own package, or from single modules
    beside them; anything else that they import has to be installed where the checkpoint is loaded.

    Args:
        config_class (`type[PreTrainedConfig]`): the config of the family.
        models (`dict[str, type[PreTrainedModel]]`): the model that each Auto class makes of such a config, by the name of
            the Auto class.
        lora_target_modules (`Sequence[str]`, *optional*): the modules that `LoraConfig()` adapts.
        facts: the other attributes of [`Family`].

    Returns:
        [`Family`]: the record, which is also in `FAMILIES`.

    Raises:
        `ValueError`: the name of no Auto class; or, of a family outside of this package, code that no checkpoint could
            carry: classes of a script or a notebook, or what [`flat_sources`] refuses.
    """
    family = Family(config_class, models, lora_target_modules=tuple(lora_target_modules), **facts)
    for auto_name in models:
        if not auto_name.startswith("Auto") or not hasattr(transformers, auto_name):
            raise ValueError(
                f"{auto_name!r} is not the name of an Auto class of transformers, such as 'AutoModelForCausalLM'."
            )
    if not config_class.__module__.startswith(f"{PACKAGE}."):
        flat_sources(family)
    register_class_names(config_class.model_type, models)
    if lora_target_modules:
        register_lora_target_modules(config_class, lora_target_modules)
    AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
    for auto_name, model_class in models.items():
        getattr(transformers, auto_name).register(config_class, model_class, exist_ok=True)
    if family.image_processor is not None and is_vision_available():
        processor_class = type(family.image_processor(config_class()))
        AutoImageProcessor.register(config_class, image_processor_classes={"pil": processor_class}, exist_ok=True)
    FAMILIES[config_class.model_type] = family
    write_json = config_class.to_json_file

    # `save_pretrained` takes stock of the folder first and uploads what changes after that; this is called in between.
    @functools.wraps(write_json)
    def to_json_file(self, json_file_path: str | os.PathLike, use_diff: bool = True):
        path = Path(json_file_path)
        if type(self) is config_class and path.name == CONFIG_NAME:
            for name, source in flat_sources(family).items():
                (path.parent / name).write_text(source, encoding="utf-8")
            self.auto_map = {**(getattr(self, "auto_map", None) or {}), **auto_map(family)}
        write_json(self, json_file_path, use_diff=use_diff)

    config_class.to_json_file = to_json_file
    return family


def auto_map(family: Family) -> dict[str, str]:
    """What `config.json` says of the code beside it: `"module.Class"` by the name of the Auto class."""
    classes = {"AutoConfig": family.config_class, **family.models}
    return {name: f"{_last_name(cls.__module__)}.{cls.__name__}" for name, cls in classes.items()}


@functools.cache
def flat_sources(family: Family) -> dict[str, str]:
    """
    The modules of a family's classes, and every module that these import from this package or from beside themselves,
    directly or not, for one flat folder.

    Returns:
        `dict[str, str]`: the text of each file by its name.

    Raises:
        `ValueError`: classes that were defined in a script or a notebook; an import that a flat folder cannot have; two
            modules with the same last name.
    """
    classes = (family.config_class, *family.models.values())
    for cls in classes:
        if cls.__module__ == "__main__":
            raise ValueError(
                f"{cls.__name__} was defined in a script or a notebook, whose code no checkpoint can carry. Move it to "
                "a module of its own (a file such as gated_sum.py), import it from there, and register it again."
            )
    own = f"modeling-sumagg {package_version()}"
    sources: dict[str, str] = {}
    written: dict[str, str] = {}
    waiting = [*sorted({cls.__module__ for cls in classes}), REGISTRATION]
    while waiting:
        module = waiting.pop()
        name = f"{_last_name(module)}.py"
        if written.setdefault(name, module) != module:
            raise ValueError(f"{written[name]} and {module} would both be written to {name}: rename one of them.")
        if name in sources:
            continue
        source, imported = flatten_imports(_source(module), module)
        package = module.partition(".")[0]
        origin = f"{own} (Apache-2.0)" if package == PACKAGE else f"{package}, by {own}"
        sources[name] = HEADER.format(origin=origin, module=module) + source + _registering(module, family)
        waiting += imported
    return sources


def package_version() -> str:
    return importlib.metadata.version("modeling-sumagg")


def read_header(path: Path) -> tuple[str, str] | None:
    """The version of modeling-sumagg that wrote a file and the module that it holds; `None`: it wrote no such file."""
    with path.open(encoding="utf-8", errors="replace") as file:
        match = HEADER_PATTERN.match(file.readline())
    return None if match is None else (match[1], match[2])


def _source(module: str) -> str:
    spec = sys.modules[module].__spec__ if module in sys.modules else importlib.util.find_spec(module)
    source = spec.loader.get_source(module) if spec is not None and hasattr(spec.loader, "get_source") else None
    if source is None:
        raise ValueError(f"The source of the module {module} cannot be read, so no checkpoint can carry it.")
    return source


def _last_name(module: str) -> str:
    return module.rpartition(".")[2]


def _registering(module: str, family: Family) -> str:
    """What the file of a module does at its end for the classes that it defines, in the formatting of this project."""
    imported, lines = [], []
    # The loader may load the module of the config and that of the models into separate packages.
    if family.config_class.__module__ == module:
        config = family.config_class.__name__
        lines.append(f'{config}.register_for_auto_class("AutoConfig")')
        if family.lora_target_modules:
            imported.append(register_lora_target_modules.__name__)
            entries = [f'        "{name}",' for name in family.lora_target_modules]
            lines += [f"{imported[-1]}(", f"    {config},", "    [", *entries, "    ],", ")"]
    models = {name: cls.__name__ for name, cls in family.models.items() if cls.__module__ == module}
    lines += [f'{cls}.register_for_auto_class("{name}")' for name, cls in models.items()]
    if models:
        imported.append(register_class_names.__name__)
        entries = [f'        "{name}": {cls},' for name, cls in models.items()]
        lines += [f"{imported[-1]}(", f'    "{family.config_class.model_type}",', "    {", *entries, "    },", ")"]
    if not lines:
        return ""
    if imported:
        names = ", ".join(sorted(imported))
        lines = [f"from .{_last_name(REGISTRATION)} import {names}  # noqa: E402", "", "", *lines]
    return "".join(f"{line}\n" for line in ["", "", *lines])


def flatten_imports(source: str, module: str) -> tuple[str, list[str]]:
    """
    Rewrite the imports of a module to name files of one folder, `from .ops.name import x` to `from .name import x`, and
    keep each block of relative ones in alphabetical order. Names that are imported from a package come from the module
    that defines them. Calls of `register_family` are left out: what they do without the package stands elsewhere.

    Args:
        source (`str`): the text of the module.
        module (`str`): its full name.

    Returns:
        `tuple[str, list[str]]`: the new text, and the full names of the modules imported.

    Raises:
        `ValueError`: an import of a module as a whole, or from a package of what none of its modules defines.
    """
    tree = ast.parse(source)
    lines = source.splitlines(keepends=True)
    package = module if _is_package(module) else module.rpartition(".")[0]
    calls = [node for node in tree.body if _calls_register_family(node)]
    for call in calls:
        _replace(call, "", lines)
    imported: list[str] = []
    relative: list[ast.ImportFrom] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import) and any(_is_carried(alias.name, module) for alias in node.names):
            inside = {id(part) for call in calls for part in ast.walk(call)}
            used = any(isinstance(n, ast.Name) and n.id == PACKAGE and id(n) not in inside for n in ast.walk(tree))
            if [alias.name for alias in node.names] != [PACKAGE] or node.names[0].asname or used:
                raise ValueError(
                    f"{module}, line {node.lineno}: `{ast.unparse(node)}` imports a module as a whole, which the loader "
                    "of a checkpoint's code does not know: write `from module import name`."
                )
            _replace(node, "", lines)
        elif isinstance(node, ast.ImportFrom):
            target = importlib.util.resolve_name("." * node.level + (node.module or ""), package)
            if node.level == 0 and not _is_carried(target, module):
                continue
            if _is_package(target):
                names = _defining_modules(node, target, module)
                imported += names
                indent = " " * node.col_offset
                statements = (f"from .{_last_name(home)} import {', '.join(names[home])}" for home in sorted(names))
                _replace(node, "".join(f"{indent}{statement}\n" for statement in statements), lines)
                continue
            imported.append(target)
            if node.level > 0 and node in tree.body:
                relative.append(node)
            first = node.lineno - 1
            lines[first] = re.sub(r"from\s+[\w.]+", f"from .{_last_name(target)}", lines[first], count=1)

    blocks: list[list[ast.ImportFrom]] = []
    for node in relative:
        if blocks and blocks[-1][-1].end_lineno == node.lineno - 1:
            blocks[-1].append(node)
        else:
            blocks.append([node])
    for nodes in blocks:
        texts = ["".join(lines[node.lineno - 1 : node.end_lineno]) for node in nodes]
        ordered = "".join(sorted(texts, key=lambda text: text.split()[1]))
        lines[nodes[0].lineno - 1 : nodes[-1].end_lineno] = ordered.splitlines(keepends=True)
    return "".join(lines), imported


def _calls_register_family(node: ast.AST) -> bool:
    if not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)):
        return False
    return ast.unparse(node.value.func).rpartition(".")[2] == register_family.__name__


def _replace(node: ast.AST, text: str, lines: list[str]) -> None:
    """Put a text in the place of a statement, so that the other lines keep their numbers."""
    height = len(lines[node.lineno - 1 : node.end_lineno])
    lines[node.lineno - 1 : node.end_lineno] = [text, *[""] * (height - 1)]


def _is_package(module: str) -> bool:
    return getattr(importlib.util.find_spec(module), "submodule_search_locations", None) is not None


def _is_carried(target: str, module: str) -> bool:
    """Whether a checkpoint carries what a module imports absolutely: parts of this package, and its own neighbours."""
    ours, theirs = module.partition(".")[0], target.partition(".")[0]
    if theirs in (PACKAGE, ours):
        return True
    folder = _folder(theirs)
    return folder is not None and ours != PACKAGE and folder == _folder(ours)


def _folder(name: str) -> Path | None:
    """The folder of a module or package of the top level; `None` for what is built in or installed."""
    spec = importlib.util.find_spec(name)
    if spec is None or not (spec.has_location or spec.submodule_search_locations):
        return None
    path = Path([*(spec.submodule_search_locations or [spec.origin or ""])][0])
    return None if path.parent.name in ("site-packages", "dist-packages") else path.parent


def _defining_modules(node: ast.ImportFrom, package: str, module: str) -> dict[str, list[str]]:
    """The names that a statement imports from a package, with their aliases, by the module that defines them."""
    names: dict[str, list[str]] = {}
    for alias in node.names:
        if alias.name == register_family.__name__:
            continue
        home = getattr(getattr(importlib.import_module(package), alias.name, None), "__module__", None)
        if home is None or not _is_carried(home, module):
            raise ValueError(
                f"{module}, line {node.lineno}, imports {alias.name} from the package {package}, which a flat folder does "
                "not have: import it from the module that defines it."
            )
        names.setdefault(home, []).append(ast.unparse(alias))
    return names
