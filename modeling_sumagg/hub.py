"""Model cards of what was trained, the check of a checkpoint folder before it is uploaded, and new code for old ones.

The commands are `python -m modeling_sumagg check FOLDER` and `python -m modeling_sumagg update FOLDER`.
"""

import argparse
import sys

from . import __main__ as commands
from .publishing.cards import create_model_card, decode_state_size, save_model_card
from .publishing.files import check_output_dir
from .publishing.folder_checks import check_card, check_folder
from .publishing.update import update_folder


def main() -> None:
    """The command of version 0.2, `python -m modeling_sumagg.hub`."""
    parser = argparse.ArgumentParser(
        prog="python -m modeling_sumagg.hub",
        description="Check a checkpoint folder before it is uploaded, or update the code in it.",
        allow_abbrev=False,
    )
    parser.add_argument("folder", help="the folder that `save_pretrained` wrote")
    parser.add_argument("--update", action="store_true", help="update the code in the folder")
    arguments = parser.parse_args()
    command = "update" if arguments.update else "check"
    print(f"`{parser.prog}` is now `python -m modeling_sumagg {command} FOLDER`.", file=sys.stderr)
    commands.main([command, arguments.folder])


__all__ = [
    "check_card",
    "check_folder",
    "check_output_dir",
    "create_model_card",
    "decode_state_size",
    "main",
    "save_model_card",
    "update_folder",
]

if __name__ == "__main__":
    main()
