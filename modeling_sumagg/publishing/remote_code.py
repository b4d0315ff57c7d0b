"""Self-contained checkpoints: the code of a model family, written flat beside the weights.

transformers loads the code of a checkpoint from one folder of modules that import each other as `from .name import …`.
The files written here are the sources with their imports flattened to that form and, at their ends, the registering of
their classes: a model works without the package as it works with it, and transformers copies the code when such a model
is saved again.

The name of each file begins with `sumagg_` and a digest of the family's code. So it replaces no file of the user's, and
old and new code in one folder never mix: the `auto_map` in `config.json` names one or the other. The modules of the
classes are also there under their own names, by which version 0.2 wrote them and other repositories may refer to them.
"""

import ast
import functools
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import re
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import transformers
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.dynamic_module_utils import get_relative_imports

# From its own module: `transformers` may hide the name where torchvision is missing.
from transformers.models.auto.image_processing_auto import AutoImageProcessor
from transformers.utils import CONFIG_NAME, is_vision_available

from ..common.registration import register_class_names
from ..common.whole_files import write_whole
from ..configuration.configuration_fields import NamedFields
from ..models.families import FAMILIES, Family
from .files import PREFIX, refuse_foreign_config, refuse_foreign_files, remove_old_code, write_code
from .flattening import PACKAGE, REGISTRATION, flatten_imports, last_name


HEADER = """\
# From the Python package {origin}, module {module}.
# Written when a model is saved, which replaces it. Only its imports, and what it registers at its end, are not the source.
"""
DIGITS = 6
PLACEHOLDER = f"{PREFIX}{'0' * DIGITS}_"


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

    A family that is registered again, with the same config class or a reloaded one, replaces its record.

    Args:
        config_class (`type[PreTrainedConfig]`): the config of the family.
        models (`dict[str, type[PreTrainedModel]]`): the model that each Auto class makes of such a config, by the name of
            the Auto class.
        lora_target_modules (`Sequence[str]`, *optional*): the modules that `LoraConfig()` adapts; by default those
            of the config that this one is derived from.
        facts: the other attributes of [`Family`].

    Returns:
        [`Family`]: the record, which is also in `FAMILIES`.

    Raises:
        `ValueError`: a `model_type` that another config has, or that is no name; the name of no Auto class; names of
            modules that are none; or, of a family outside of this package, code that no checkpoint could carry: classes
            of a script or a notebook, or what [`flat_sources`] refuses.
    """
    _check_names(config_class, models, lora_target_modules)
    targets = tuple(lora_target_modules) or getattr(config_class, "lora_target_modules", ())
    family = Family(config_class, models, lora_target_modules=targets, **facts)
    model_type = config_class.model_type
    if not config_class.__module__.startswith(f"{PACKAGE}."):
        _check_as_the_loader_reads(flat_sources(family))
    if lora_target_modules:
        config_class.lora_target_modules = targets
    register_class_names(model_type, models)
    AutoConfig.register(model_type, config_class, exist_ok=True)
    for auto_name, model_class in models.items():
        getattr(transformers, auto_name).register(config_class, model_class, exist_ok=True)
    if family.image_processor is not None and is_vision_available():
        processor_class = type(family.image_processor(config_class()))
        AutoImageProcessor.register(config_class, image_processor_classes={"pil": processor_class}, exist_ok=True)
    FAMILIES[model_type] = family
    # Once for a config class and those derived from it.
    if not hasattr(config_class.to_json_file, "writes_code"):
        config_class.to_json_file = _writing_code(config_class.to_json_file)
    return family


def _check_names(
    config_class: type[PreTrainedConfig], models: dict[str, type[PreTrainedModel]], lora_target_modules: Sequence[str]
) -> None:
    """Raise where one of the names that a family is registered by is not right."""
    name = config_class.model_type
    if not isinstance(name, str) or not re.fullmatch(r"\w[\w.-]*", name):
        raise ValueError(
            f"The `model_type` of {config_class.__name__} must be a name of letters, digits, '_', '-' and '.', got "
            f'{name!r}: `model_type = "my_mixer"` in the class.'
        )
    other = FAMILIES[name].config_class if name in FAMILIES else None
    if other is None and name in CONFIG_MAPPING:
        other = CONFIG_MAPPING[name]
    # The same class may have been read again, as a notebook does.
    if other is not None and (other.__module__, other.__qualname__) != (
        config_class.__module__,
        config_class.__qualname__,
    ):
        raise ValueError(
            f"The `model_type` {name!r} of {config_class.__name__} is that of {other.__module__}.{other.__qualname__}: "
            "give the class a `model_type` of its own. (After a class was moved to another module, restart Python.)"
        )
    for auto_name in models:
        if not auto_name.startswith("Auto") or not hasattr(transformers, auto_name):
            raise ValueError(
                f"{auto_name!r} is not the name of an Auto class of transformers, such as 'AutoModelForCausalLM'."
            )
    if isinstance(lora_target_modules, str) or not all(
        isinstance(module, str) and re.fullmatch(r"[\w.]+", module) for module in lora_target_modules
    ):
        raise ValueError(
            "`lora_target_modules` must be a list of the last parts of module names, such as ['in_proj', 'v_proj'], got "
            f"{lora_target_modules!r}."
        )
    if lora_target_modules and not issubclass(config_class, NamedFields):
        raise ValueError(
            f"`lora_target_modules` is for configs that are derived from `TextConfig`, and {config_class.__name__} is "
            "not: leave it out, and name the modules in `LoraConfig(target_modules=...)`."
        )


def _writing_code(write_json):
    """The `to_json_file` of a config class, which writes the code of the family too where it writes a `config.json`."""

    # `save_pretrained` takes stock of the folder first and uploads what changes after that; this is called in between.
    @functools.wraps(write_json)
    def to_json_file(self, json_file_path: str | os.PathLike, use_diff: bool = True):
        path, family = Path(json_file_path), FAMILIES.get(self.model_type)
        if path.name != CONFIG_NAME or family is None or type(self) is not family.config_class:
            return write_json(self, json_file_path, use_diff=use_diff)
        sources, names = flat_sources(family), own_names(family)
        refuse_foreign_files(path.parent, [*sources, *names])
        refuse_foreign_config(path)
        write_code(path.parent, sources)
        self.auto_map = {**(getattr(self, "auto_map", None) or {}), **auto_map(family)}
        write_whole(path, self.to_json_string(use_diff=use_diff).encode())
        write_code(path.parent, names)
        remove_old_code(path.parent, sources)

    to_json_file.writes_code = True
    return to_json_file


def auto_map(family: Family) -> dict[str, str]:
    """What `config.json` says of the code beside it: `"module.Class"` by the name of the Auto class."""
    prefix = _prefix(family)
    classes = {"AutoConfig": family.config_class, **family.models}
    return {name: f"{prefix}{last_name(cls.__module__)}.{cls.__name__}" for name, cls in classes.items()}


def _prefix(family: Family) -> str:
    return next(iter(flat_sources(family)))[: len(PLACEHOLDER)]


@functools.cache
def flat_sources(family: Family) -> dict[str, str]:
    """
    The modules of a family's classes, and every module that these import from this package or from beside themselves,
    directly or not, for one flat folder. The names of all files begin with `sumagg_`, the first digits of a digest of the
    code, and an underscore: `sumagg_0b7928_modeling_sumagg.py`.

    Returns:
        `dict[str, str]`: the text of each file by its name.

    Raises:
        `ValueError`: classes that were defined in a script or a notebook; an import that a flat folder cannot have; two
            modules with the same last name; code that would be no Python.
    """
    sources = _flattened(family)
    digest = hashlib.sha256("".join(sources.values()).encode()).hexdigest()
    prefix = f"{PREFIX}{digest[:DIGITS]}_"
    return {name.replace(PLACEHOLDER, prefix): text.replace(PLACEHOLDER, prefix) for name, text in sources.items()}


@functools.cache
def own_names(family: Family) -> dict[str, str]:
    """
    The modules of a family's classes under their own names, as `modeling_sumagg.py`: they import the classes from the
    files of [`flat_sources`].

    Returns:
        `dict[str, str]`: the text of each file by its name.
    """
    classes: dict[str, list[str]] = {}
    for cls in (family.config_class, *family.models.values()):
        classes.setdefault(cls.__module__, []).append(cls.__name__)
    texts = {}
    for module, names in classes.items():
        lines = [
            *_header(module).splitlines(),
            '"""The module under its own name, by which other repositories may refer to it."""',
            "",
            f"from .{_prefix(family)}{last_name(module)} import (  # noqa: F401",
            *(f"    {name}," for name in sorted(set(names))),
            ")",
        ]
        texts[f"{last_name(module)}.py"] = "".join(f"{line}\n" for line in lines)
    return texts


def _header(module: str) -> str:
    own, package = f"modeling-sumagg {package_version()}", module.partition(".")[0]
    return HEADER.format(origin=f"{own} (Apache-2.0)" if package == PACKAGE else f"{package}, by {own}", module=module)


def _flattened(family: Family) -> dict[str, str]:
    """The files with `PLACEHOLDER` in their names, in the place of the digest of what they hold."""
    classes = (family.config_class, *family.models.values())
    for cls in classes:
        if cls.__module__ == "__main__":
            raise ValueError(
                f"{cls.__name__} was defined in a script or a notebook, whose code no checkpoint can carry. Move it to "
                "a module of its own (a file such as gated_sum.py), import it from there, and register it again."
            )
    sources: dict[str, str] = {}
    written: dict[str, str] = {}
    waiting = [*sorted({cls.__module__ for cls in classes}), REGISTRATION]
    while waiting:
        module = waiting.pop()
        name = f"{PLACEHOLDER}{last_name(module)}.py"
        if written.setdefault(name, module) != module:
            raise ValueError(
                f"{written[name]} and {module} would both be written to *{last_name(module)}.py: rename one of them."
            )
        if name in sources:
            continue
        try:
            source, imported = flatten_imports(_source(module), module, PLACEHOLDER)
            text = _header(module) + source + _registering(module, family)
            ast.parse(text)
        except SyntaxError as error:
            raise ValueError(
                f"The source of {module}, as it is now, is no Python: {error.msg} in {str(error.text).strip()!r}. Correct "
                "it and import it again."
            ) from error
        sources[name] = text
        waiting += imported
    return sources


def _check_as_the_loader_reads(sources: dict[str, str]) -> None:
    """Raise where transformers' loader, which looks for imports in lines and not in the syntax tree, misses a file."""
    with tempfile.TemporaryDirectory() as folder:
        for name, source in sources.items():
            path = Path(folder) / name
            path.write_text(source, encoding="utf-8")
            for needed in get_relative_imports(path):
                if f"{needed}.py" not in sources:
                    raise ValueError(
                        f"A line of {name} reads `from .{needed} import`, as in a docstring, and the loader of a "
                        f"checkpoint's code would look for a file {needed}.py: write it in another way."
                    )


def package_version() -> str:
    return importlib.metadata.version("modeling-sumagg")


def _source(module: str) -> str:
    try:
        spec = sys.modules[module].__spec__ if module in sys.modules else importlib.util.find_spec(module)
    except ModuleNotFoundError:
        spec = None
    source = spec.loader.get_source(module) if spec is not None and hasattr(spec.loader, "get_source") else None
    if source is None:
        raise ValueError(f"The source of the module {module} cannot be read, so no checkpoint can carry it.")
    return source


def _registering(module: str, family: Family) -> str:
    """What the file of a module does at its end for the classes that it defines, in the formatting of this project."""
    lines = []
    # The loader may load the module of the config and that of the models into separate packages.
    if family.config_class.__module__ == module:
        config = family.config_class.__name__
        if family.lora_target_modules:
            entries = [f"    {_literal(name)}," for name in family.lora_target_modules]
            lines += [f"{config}.lora_target_modules = (", *entries, ")"]
        lines.append(f'{config}.register_for_auto_class("AutoConfig")')
    models = {name: cls.__name__ for name, cls in family.models.items() if cls.__module__ == module}
    lines += [f"{cls}.register_for_auto_class({_literal(name)})" for name, cls in models.items()]
    if models:
        function = register_class_names.__name__
        entries = [f"        {_literal(name)}: {cls}," for name, cls in models.items()]
        lines = [
            f"from .{PLACEHOLDER}{last_name(REGISTRATION)} import {function}  # noqa: E402",
            "",
            "",
            *lines,
            f"{function}(",
            f"    {_literal(family.config_class.model_type)},",
            "    {",
            *entries,
            "    },",
            ")",
        ]
    return "".join(f"{line}\n" for line in ["", "", *lines]) if lines else ""


def _literal(text: str) -> str:
    """A string of Python in double quotes."""
    return json.dumps(text, ensure_ascii=False)
