"""The commands of the package: `python -m modeling_sumagg --help`.

Each command imports what it needs when it runs: a folder that is no checkpoint is told apart before torch is imported.
"""

import argparse
import importlib
import sys
from collections.abc import Sequence


def check(arguments: argparse.Namespace) -> None:
    from .publishing.folder_checks import check_folder

    check_folder(arguments.folder)


def update(arguments: argparse.Namespace) -> None:
    _import_the_models()
    from .publishing.update import update_folder

    print(*update_folder(arguments.folder), sep="\n")


def convert(arguments: argparse.Namespace) -> None:
    _import_the_models()
    from .publishing.conversion import convert_by_command

    convert_by_command(arguments)


def _import_the_models() -> None:
    """Import and register all families, which the package leaves out when it is run as a command."""
    package = sys.modules[__package__]
    if not hasattr(package, "FAMILIES"):
        importlib.reload(package)


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m modeling_sumagg", description=__doc__.partition("\n")[0])
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(function, **kwargs) -> argparse.ArgumentParser:
        command = commands.add_parser(function.__name__, allow_abbrev=False, **kwargs)
        command.set_defaults(run=function)
        return command

    what = (
        "check a folder before it is uploaded: load and run it where this package is not installed, and read its card"
    )
    add(check, help=what, description=what).add_argument("folder", help="the folder that `save_pretrained` wrote")

    what = "bring the code in a folder to the installed version; weights and card stay as they are"
    add(update, help=what, description=what).add_argument("folder", help="the folder that `save_pretrained` wrote")

    what = "convert a checkpoint of an original implementation into one that transformers loads"
    command = add(convert, help=what, description=what)
    command.add_argument("--model_family", required=True, help="sumagg, tost or tost_text")
    command.add_argument("--checkpoint_path", required=True, help="a .pth, .pt or .safetensors file")
    command.add_argument("--output_dir", required=True, help="the folder to write, which must be new or empty")
    command.add_argument(
        "--num_attention_heads", type=int, help="heads of the attention layers, for sumagg checkpoints that have some"
    )
    command.add_argument("--id2label", help="a JSON file with the name of every class: {index: name}")
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command; an error that the user can mend ends the program with one line."""
    parsed = make_parser().parse_args(arguments)
    try:
        parsed.run(parsed)
    except (OSError, ValueError) as error:
        sys.exit(f"error: {' '.join(str(error).split())}")


if __name__ == "__main__":
    main()
