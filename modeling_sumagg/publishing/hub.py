"""The public functions of publishing: model cards, the check of a folder before it is uploaded, and new code for old folders."""

from .cards import create_model_card, decode_state_size, save_model_card
from .files import check_output_dir
from .folder_checks import check_card, check_folder
from .update import update_folder


__all__ = [
    "check_card",
    "check_folder",
    "check_output_dir",
    "create_model_card",
    "decode_state_size",
    "save_model_card",
    "update_folder",
]
