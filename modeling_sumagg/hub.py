"""Model cards of what was trained, and the check of a checkpoint folder before it is uploaded.

```bash
python -m modeling_sumagg.hub DIR
```

loads the folder with `trust_remote_code=True` in a new process that cannot import this package, runs the model, reads
the card, prints what it found, and exits non-zero with the reason where something is wrong.
"""

import argparse
import sys

from .publishing.cards import create_model_card, decode_state_size
from .publishing.folder_checks import check_card, check_folder


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m modeling_sumagg.hub", description=check_folder.__doc__)
    parser.add_argument("folder", help="the folder that `save_pretrained` wrote")
    try:
        check_folder(parser.parse_args().folder)
    except ValueError as error:
        sys.exit(f"error: {error}")


__all__ = ["check_card", "check_folder", "create_model_card", "decode_state_size", "main"]

if __name__ == "__main__":
    main()
