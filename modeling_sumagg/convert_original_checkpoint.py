"""The command of version 0.2 that converts a checkpoint of an original implementation."""

import sys

from . import __main__ as commands
from .publishing.conversion import convert_original_checkpoint, read_state_dict


def main() -> None:
    print(
        "`python -m modeling_sumagg.convert_original_checkpoint` is now `python -m modeling_sumagg convert`.",
        file=sys.stderr,
    )
    commands.main(["convert", *sys.argv[1:]])


__all__ = ["convert_original_checkpoint", "main", "read_state_dict"]

if __name__ == "__main__":
    main()
