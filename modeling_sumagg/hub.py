"""Model cards of what was trained, the check of a checkpoint folder before it is uploaded, and new code for old ones.

```bash
python -m modeling_sumagg.hub DIR
```

loads the folder with `trust_remote_code=True` in a new process that cannot import this package, runs the model, reads
the card, prints what it found, and exits non-zero with the reason where something is wrong.

```bash
python -m modeling_sumagg.hub --update DIR
```

rewrites the code in a folder to the installed version's and prints what changed.
"""

import argparse
import sys

from .publishing.cards import create_model_card, decode_state_size, save_model_card
from .publishing.folder_checks import check_card, check_folder
from .publishing.update import update_folder


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m modeling_sumagg.hub",
        description="Check a checkpoint folder before it is uploaded, or update the code in it.",
        allow_abbrev=False,
    )
    parser.add_argument("folder", help="the folder that `save_pretrained` wrote")
    parser.add_argument(
        "--update",
        action="store_true",
        help="rewrite the code in the folder to the installed version's, and leave weights and card alone",
    )
    arguments = parser.parse_args()
    try:
        if arguments.update:
            print(*update_folder(arguments.folder), sep="\n")
        else:
            check_folder(arguments.folder)
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")


__all__ = [
    "check_card",
    "check_folder",
    "create_model_card",
    "decode_state_size",
    "main",
    "save_model_card",
    "update_folder",
]

if __name__ == "__main__":
    main()
