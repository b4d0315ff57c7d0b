"""Bring the code in a checkpoint folder to the installed version's."""

import json
import os
from pathlib import Path

from transformers.utils import CONFIG_NAME

from ..common.whole_files import write_whole
from ..models.families import FAMILIES, Family
from .files import (
    code_files,
    read_auto_map,
    read_header,
    read_json,
    refuse_foreign_files,
    write_code,
)
from .remote_code import auto_map, flat_sources, own_names, package_version


def update_folder(folder: str | os.PathLike) -> list[str]:
    """
    Rewrite the code in a checkpoint folder to what the installed version would save there. Weights, card and all other
    files stay as they are; of `config.json` only the `auto_map` is changed, if it has to be.

    The new code is written beside the old, under other names. Then one step puts a `config.json` that names the new code
    in the place of the old one, and the old code is removed. So the folder loads with the old code or with the new
    at any moment, whenever the process is killed; a second update finishes what a killed one began.

    Returns:
        `list[str]`: a line for every file that was added, changed or removed.

    Raises:
        `ValueError`: the folder holds no code of this package, or something that an update would overwrite.
        `OSError`: something cannot be written. The old code and its `config.json` are what they were.
    """
    folder = Path(folder)
    family, before = _read_config(folder)
    config_path = folder / CONFIG_NAME
    headers = code_files(folder)
    sources, names = flat_sources(family), own_names(family)
    config = json.loads(before)
    references = read_auto_map(config, config_path)
    configuration = folder / f"{_module(references.get('AutoConfig'))}.py"
    if configuration.is_file() and read_header(configuration) is None:
        raise ValueError(f"{configuration} was not written by modeling-sumagg: there is nothing to update.")
    # The user's own code has entries too.
    kept = {key: value for key, value in references.items() if f"{_module(value)}.py" not in headers}
    new_map = kept | auto_map(family)
    refuse_foreign_files(folder, [*sources, *names])

    written = write_code(folder, sources, like=config_path)
    if new_map != references:
        if config_path.read_text(encoding="utf-8") != before:
            raise ValueError(f"{config_path} was written by another process meanwhile: run the update again.")
        text = json.dumps(config | {"auto_map": new_map}, indent=2, sort_keys=True) + "\n"
        write_whole(config_path, text.encode())
    written += write_code(folder, names, like=config_path)
    removed = sorted(set(headers) - set(sources) - set(names))
    for name in removed:
        (folder / name).unlink(missing_ok=True)

    if not written and not removed and new_map == references:
        return [f"{folder} has the code of the installed version already."]
    old = ", ".join(sorted({version for version, _ in headers.values()}))
    lines = [f"{folder}: the code of modeling-sumagg {old or 'unknown'} is now that of {package_version()}."]
    lines += [f"{'changed' if name in headers else 'added'}: {name}" for name in sorted(written)]
    if new_map != references:
        lines.append(f"changed: {CONFIG_NAME}")
    return lines + [f"removed: {name}" for name in removed]


def _module(reference: object) -> str:
    """The module of an entry of an `auto_map`, `"module.Class"`, with the repository that it may name."""
    return str(reference).partition(".")[0]


def _read_config(folder: Path) -> tuple[Family, str]:
    """The family of a checkpoint and the text of its config; raises where the folder holds no code of this package."""
    if (folder / "adapter_config.json").is_file():
        raise ValueError(f"{folder} holds an adapter, which carries no code: update the folder of its base model.")
    path = folder / CONFIG_NAME
    if not path.is_file():
        raise ValueError(f"{folder} holds no {CONFIG_NAME}: it is not a checkpoint.")
    config = read_json(path)
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise ValueError(
            f"{folder} holds a model of the type {model_type!r}, whose code modeling-sumagg does not know: it knows "
            f"{', '.join(sorted(FAMILIES))}. Import the module that registers another one and call "
            "`modeling_sumagg.publishing.hub.update_folder`."
        )
    references = read_auto_map(config, path)
    if not references:
        raise ValueError(f"The {CONFIG_NAME} in {folder} has no `auto_map`: the folder carries no code to update.")
    repository, separator, _ = str(references.get("AutoConfig")).partition("--")
    if separator:
        raise ValueError(f"The code of {folder} is not in it but in {repository}: update that.")
    return FAMILIES[model_type], path.read_text(encoding="utf-8")
