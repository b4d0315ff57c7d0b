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


def export(arguments: argparse.Namespace) -> None:
    _import_the_models()
    try:
        from .publishing.export import export_folder
    except ImportError as error:
        raise ValueError(error) from error

    folder, target = arguments.folder.rstrip("/"), arguments.output_dir
    options = {"to": arguments.to, "int8": arguments.int8, "max_length": arguments.max_length}
    print(*export_folder(folder, target or f"{folder}-{arguments.to}", **options), sep="\n")


def linearize(arguments: argparse.Namespace) -> None:
    _import_the_models()
    try:
        from .training.linearize import command
    except ImportError as error:
        raise ValueError(error) from error

    command(arguments.options)


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

    what = "write a model as ONNX graphs, or as a web page that writes without a server"
    command = add(export, help=what, description=what)
    command.add_argument("folder", help="the folder that `save_pretrained` wrote")
    command.add_argument("--to", choices=["onnx", "web"], default="onnx", help="graphs, or with them a page (onnx)")
    command.add_argument(
        "--output_dir", help="the folder to write, which must be new or empty; by default FOLDER-onnx or FOLDER-web"
    )
    command.add_argument("--int8", action="store_true", help="keep the weights of matrix products in 8 bits")
    command.add_argument(
        "--max_length", type=int, default=1024, help="tokens that layers of full attention keep (1024)"
    )

    what = "make a model of constant decode state of a pretrained Llama, Mistral, Qwen2 or Qwen3"
    # Its options are those of a training script, which reads them itself.
    add(linearize, help=what, description=what, add_help=False, prefix_chars="\0").add_argument(
        "options", nargs=argparse.REMAINDER
    )
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command; an error that the user can mend ends the program with one line."""
    parsed = make_parser().parse_args(arguments)
    try:
        parsed.run(parsed)
    except (OSError, ValueError) as error:
        sys.exit(f"error: {' '.join(str(error).split())}")


def arguments_of_today(module: str, arguments: list[str]) -> list[str]:
    """The arguments of `main` for a command of version 0.2, `python -m module arguments`; those of 0.3 stay as they are."""
    old = module.removeprefix(f"{__package__}.")
    if old == "hub":
        command = "update" if "--update" in arguments else "check"
        arguments = [argument for argument in arguments if argument != "--update"]
    elif old == "convert_original_checkpoint":
        command = "convert"
    else:
        return arguments
    print(f"`python -m {module}` is now `python -m {__package__} {command}`.", file=sys.stderr)
    return [command, *arguments]


if __name__ == "__main__":
    main(arguments_of_today(__spec__.name, sys.argv[1:]))
