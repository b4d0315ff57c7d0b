"""Convert a checkpoint of the original implementations: `python -m modeling_sumagg.convert_original_checkpoint --help`."""

from .publishing.conversion import convert_original_checkpoint, main, read_state_dict


__all__ = ["convert_original_checkpoint", "main", "read_state_dict"]

if __name__ == "__main__":
    main()
