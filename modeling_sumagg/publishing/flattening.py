"""Rewrite the imports of a module for a flat folder, the only form that transformers' loader of remote code reads."""

import ast
import importlib
import importlib.machinery
import importlib.util
from pathlib import Path

from ..common.registration import register_family
from .moved_modules import MOVED


PACKAGE = __name__.partition(".")[0]
REGISTRATION = register_family.__module__
LINE_LENGTH = 119


def flatten_imports(source: str, module: str, prefix: str = "") -> tuple[str, list[str]]:
    """
    Rewrite the imports of a module to name files of one folder: `from .ops.name import x` to `from .<prefix>name import
    x`. All other text stays as it is.

    A name that is imported from a package comes from the module that defines it. `register_family` becomes the function
    of that name in `registration.py`, which does nothing: a checkpoint's files register their classes at their ends.
    The loader finds an import at the beginning of a line only, so each one gets a line of its own. Imports that follow
    each other at the top of a module are sorted by their new names.

    Args:
        source (`str`): the text of the module.
        module (`str`): its full name.
        prefix (`str`): what the names of all files begin with.

    Returns:
        `tuple[str, list[str]]`: the new text, and the full names of the modules imported.

    Raises:
        `ValueError`: an import of a module as a whole; an import from a package of what none of its modules defines.
    """
    source = _without_package_name(source)
    tree = ast.parse(source)
    text = _Text(source)
    package = module if _is_package(module) else module.rpartition(".")[0]
    imported: list[str] = []
    flattened: dict[ast.stmt, list[str]] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import) and any(_is_carried(alias.name, module) for alias in node.names):
            _refuse_whole_modules(node, module, tree)
            others = [alias for alias in node.names if alias.name != PACKAGE]
            flattened[node] = [ast.unparse(ast.Import(others))] if others else []
            flattened[node].append(f"from .{prefix}{last_name(REGISTRATION)} import {register_family.__name__}")
            imported.append(REGISTRATION)
        elif isinstance(node, ast.ImportFrom):
            target = importlib.util.resolve_name("." * node.level + (node.module or ""), package)
            if node.level == 0 and not _is_carried(target, module):
                continue
            names = _names_by_module(node, target, module)
            imported += names
            flattened[node] = [
                _import_statement(text, node, f".{prefix}{last_name(home)}", aliases)
                for home, aliases in sorted(names.items(), key=lambda item: last_name(item[0]))
            ]
    return text.edited(_edits(tree, flattened, text)), imported


def last_name(module: str) -> str:
    return module.rpartition(".")[2]


class _Text:
    """A source as bytes, in which the syntax tree counts columns."""

    def __init__(self, source: str):
        self.data = source.encode()
        # Only here does Python end a line, and not at a form feed or U+2028.
        self.line_starts = [0, *(i + 1 for i, byte in enumerate(self.data) if byte == ord("\n")), len(self.data) + 1]

    def start(self, node: ast.AST) -> int:
        return self.line_starts[node.lineno - 1] + node.col_offset

    def end(self, node: ast.AST) -> int:
        return self.line_starts[node.end_lineno - 1] + node.end_col_offset

    def of(self, start: int, end: int) -> str:
        return self.data[start:end].decode()

    def before(self, node: ast.AST) -> str:
        """What stands before a node on its first line."""
        return self.of(self.line_starts[node.lineno - 1], self.start(node))

    def line_end(self, node: ast.AST) -> int:
        """The end of the last line of a node, with a comment behind it."""
        return self.line_starts[node.end_lineno] - 1

    def edited(self, edits: dict[tuple[int, int], str]) -> str:
        """The text with others in the places `(start, end)`."""
        data = bytearray(self.data)
        # From the last to the first, so that the places before it stay true.
        for (start, end), new in sorted(edits.items(), reverse=True):
            data[start:end] = new.encode()
        return data.decode()


def _without_package_name(source: str) -> str:
    """The source with `register_family` where it says `modeling_sumagg.register_family`."""
    tree, text = ast.parse(source), _Text(source)
    names = {
        alias.asname or alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.Import)
        for alias in node.names
        if alias.name == PACKAGE
    }
    uses = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and node.attr == register_family.__name__
        and isinstance(node.value, ast.Name)
        and node.value.id in names
    ]
    return text.edited({(text.start(node), text.end(node)): node.attr for node in uses})


def _import_statement(text: _Text, node: ast.ImportFrom, target: str, aliases: list[ast.alias]) -> str:
    """`from target import aliases`, formatted as the statement was if it imports the same names."""
    if len(aliases) == len(node.names):
        head = text.of(text.start(node), text.start(node.names[0]))
        names = head[head.rindex("import") :] + text.of(text.start(node.names[0]), text.end(node))
    else:
        names = "import " + ", ".join(map(ast.unparse, aliases))
    statement, indent = f"from {target} {names}", text.before(node)
    if "\n" in statement or len(indent + statement) <= LINE_LENGTH or indent.strip():
        return statement
    lines = "".join(f"{indent}    {ast.unparse(alias)},\n" for alias in aliases)
    return f"from {target} import (\n{lines}{indent})"


def _edits(tree: ast.Module, flattened: dict[ast.stmt, list[str]], text: _Text) -> dict[tuple[int, int], str]:
    """The new text of each place `(start, end)` that changes."""
    edits = {}
    for parent in ast.walk(tree):
        for _, body in ast.iter_fields(parent):
            if not (isinstance(body, list) and body and isinstance(body[0], ast.stmt)):
                continue
            for block in _blocks(body, flattened):
                first, last = block[0][0], block[-1][-1]
                if len(block) > 1:
                    # Each line with the comment behind it, by the name of its module.
                    lines = [text.of(text.end(node), text.line_end(node)) for (node,) in block]
                    lines = ["\n".join(flattened[node]) + line for (node,), line in zip(block, lines, strict=True)]
                    lines.sort(key=lambda line: line.split()[1])
                    edits[text.start(first), text.line_end(last)] = "\n".join(lines)
                    continue
                lines = []
                for node in block[0]:
                    lines += flattened.get(node) or [text.of(text.start(node), text.end(node))]
                before = text.before(first)
                indent = before[: len(before) - len(before.lstrip())]
                if before.strip():
                    # Behind a colon: `if TYPE_CHECKING: from ...`.
                    indent += "    "
                    lines[0] = f"\n{indent}{lines[0]}"
                edits[text.start(first), text.end(last)] = f"\n{indent}".join(lines)
    return edits


def _blocks(body: list[ast.stmt], flattened: dict[ast.stmt, list[str]]) -> list[list[list[ast.stmt]]]:
    """
    What is edited together: a line with its statements, of which one is flattened, or the relative imports that follow
    each other, a line each, at the top of a module.
    """
    lines: list[list[ast.stmt]] = []
    for node in body:
        if lines and lines[-1][-1].end_lineno == node.lineno:
            lines[-1].append(node)
        else:
            lines.append([node])
    blocks: list[list[list[ast.stmt]]] = []
    for line in lines:
        if not any(node in flattened for node in line):
            continue
        previous = blocks[-1][-1] if blocks else []
        follows = bool(previous) and previous[-1].end_lineno == line[0].lineno - 1
        if follows and _is_one_relative_import(previous) and _is_one_relative_import(line):
            blocks[-1].append(line)
        else:
            blocks.append([line])
    return blocks


def _is_one_relative_import(line: list[ast.stmt]) -> bool:
    return len(line) == 1 and isinstance(line[0], ast.ImportFrom) and line[0].level > 0 and line[0].col_offset == 0


def _refuse_whole_modules(node: ast.Import, module: str, tree: ast.Module) -> None:
    for alias in node.names:
        name = alias.asname or alias.name
        is_used = any(isinstance(other, ast.Name) and other.id == name for other in ast.walk(tree))
        if _is_carried(alias.name, module) and (alias.name != PACKAGE or is_used):
            raise ValueError(
                f"{module}, line {node.lineno}: `{ast.unparse(node)}` imports a module as a whole, which the loader of a "
                "checkpoint's code does not know: write `from module import name`."
            )


def _find_spec(module: str) -> importlib.machinery.ModuleSpec | None:
    try:
        return importlib.util.find_spec(module)
    except ModuleNotFoundError:
        # Of the package around it.
        return None


def _is_package(module: str) -> bool:
    return getattr(_find_spec(module), "submodule_search_locations", None) is not None


def _is_carried(target: str, module: str) -> bool:
    """Whether a checkpoint carries what a module imports absolutely: parts of this package, and its own neighbours."""
    ours, theirs = module.partition(".")[0], target.partition(".")[0]
    if theirs in (PACKAGE, ours):
        return True
    folder = _folder(theirs)
    return folder is not None and ours != PACKAGE and folder == _folder(ours)


def _folder(name: str) -> Path | None:
    """The folder of a module or package of the top level; `None` for what is built in or installed."""
    spec = _find_spec(name)
    if spec is None or not (spec.has_location or spec.submodule_search_locations):
        return None
    path = Path([*(spec.submodule_search_locations or [spec.origin or ""])][0])
    return None if path.parent.name in ("site-packages", "dist-packages") else path.parent


def _names_by_module(node: ast.ImportFrom, target: str, module: str) -> dict[str, list[ast.alias]]:
    """The names that a statement imports, by the module that they come from in a flat folder."""
    names: dict[str, list[ast.alias]] = {}
    for alias in node.names:
        if alias.name == register_family.__name__ and target.partition(".")[0] == PACKAGE:
            home = REGISTRATION
        elif _is_package(target):
            home = getattr(getattr(importlib.import_module(target), alias.name, None), "__module__", None)  # type: ignore[assignment]
            if home is None or not _is_carried(home, module):
                raise ValueError(
                    f"{module}, line {node.lineno}, imports {alias.name} from the package {target}, which a flat folder "
                    "does not have: import it from the module that defines it."
                )
        else:
            package, _, name = target.partition(".")
            home = f"{package}.{MOVED[name]}" if package == PACKAGE and name in MOVED else target
        names.setdefault(home, []).append(alias)
    return names
