"""Bring the code in a checkpoint folder to the installed version's."""

import json
import os
from pathlib import Path

from transformers.utils import CONFIG_NAME

from ..families import FAMILIES, Family
from .new_folder import new_folder
from .remote_code import auto_map, flat_sources, package_version, read_header


def update_folder(folder: str | os.PathLike) -> list[str]:
    """
    Rewrite the code in a checkpoint folder to what the installed version would save there. Weights, card and all other
    files stay as they are; of `config.json` only the `auto_map` is changed, if it has to be. The folder is replaced as a
    whole, see [`new_folder`]: it holds the old code or the new.

    Returns:
        `list[str]`: a line for every file that was added, changed or removed.

    Raises:
        `ValueError`: the folder holds no code of this package, or something that an update would overwrite.
    """
    folder = Path(folder)
    family, config = _read_config(folder)
    headers = {path.name: read_header(path) for path in folder.glob("*.py")}
    sources = flat_sources(family)
    references = config["auto_map"]
    for name in sorted({*sources, f"{_module(references.get('AutoConfig'))}.py"}):
        if name in headers and headers[name] is None:
            raise ValueError(f"{folder / name} was not written by modeling-sumagg: there is nothing to update.")
    removed = sorted(name for name, header in headers.items() if header is not None and name not in sources)
    written = {
        name: source
        for name, source in sources.items()
        if name not in headers or (folder / name).read_text(encoding="utf-8") != source
    }
    # The user's own code may have entries too.
    kept = {key: value for key, value in references.items() if headers.get(f"{_module(value)}.py", "") is None}
    if references != kept | auto_map(family):
        config["auto_map"] = kept | auto_map(family)
        written[CONFIG_NAME] = json.dumps(config, indent=2, sort_keys=True) + "\n"
    if not written and not removed:
        return [f"{folder} has the code of the installed version already."]

    with new_folder(folder, replaced=removed) as fresh:
        for name, text in written.items():
            (fresh / name).write_text(text, encoding="utf-8")
    old = ", ".join(sorted({header[0] for header in headers.values() if header is not None}))
    lines = [f"{folder}: the code of modeling-sumagg {old or 'unknown'} is now that of {package_version()}."]
    lines += [
        f"{'changed' if (name in headers or name == CONFIG_NAME) else 'added'}: {name}" for name in sorted(written)
    ]
    return lines + [f"removed: {name}" for name in removed]


def _module(reference: object) -> str:
    """The module of an entry of an `auto_map`, `"module.Class"`, with the repository that it may name."""
    return str(reference).partition(".")[0]


def _read_config(folder: Path) -> tuple[Family, dict]:
    """The family of a checkpoint and its config; raises where the folder holds no code of this package."""
    if (folder / "adapter_config.json").is_file():
        raise ValueError(f"{folder} holds an adapter, which carries no code: update the folder of its base model.")
    if not (folder / CONFIG_NAME).is_file():
        raise ValueError(f"{folder} holds no {CONFIG_NAME}: it is not a checkpoint.")
    try:
        config = json.loads((folder / CONFIG_NAME).read_text(encoding="utf-8"))
        model_type, references = config.get("model_type"), config.get("auto_map")
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{folder / CONFIG_NAME} is not the config of a model: {error}.") from error
    if model_type not in FAMILIES:
        raise ValueError(
            f"{folder} holds a model of the type {model_type!r}, whose code modeling-sumagg does not know: it knows "
            f"{', '.join(sorted(FAMILIES))}. Import the module that registers another one and call "
            "`modeling_sumagg.hub.update_folder`."
        )
    if not references:
        raise ValueError(f"The {CONFIG_NAME} in {folder} has no `auto_map`: the folder carries no code to update.")
    elsewhere = {_module(value).partition("--")[0] for value in references.values() if "--" in _module(value)}
    if elsewhere:
        raise ValueError(f"The code of {folder} is not in it but in {', '.join(sorted(elsewhere))}: update that.")
    return FAMILIES[model_type], config
