"""Fine-tune the quickstart's model with TRL to name a function from its docstring. About two minutes on two cores.

Beside what the other scripts need it needs TRL, and a model:

    pip install trl
    python quickstart.py
    python sft_trl.py
"""

import os
from pathlib import Path


# Threads that wait for each other sleep, and leave the processor to others: read when torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch
from transformers import HfArgumentParser
from trl import SFTConfig, SFTTrainer

import modeling_sumagg  # noqa: F401  (registers the models)
from modeling_sumagg.training.embedded_data import standard_library_functions
from modeling_sumagg.training.scripts import check_output_folder, run, user_errors


def to_prompt(row: dict) -> dict[str, str]:
    name, _, docstring = row["text"].partition("\n")
    return {"prompt": f'"""{docstring.strip().partition(chr(10))[0]}"""\ndef ', "completion": f"{name}("}


def main() -> None:
    parser = HfArgumentParser(SFTConfig, description=__doc__.partition("\n\n")[0], allow_abbrev=False)
    parser.add_argument("--model", default="runs/quickstart", help="a language model: a folder or a Hub id")
    parser.set_defaults(
        output_dir="runs/sft",
        num_train_epochs=1,
        learning_rate=1e-3,
        bf16=torch.cuda.is_available(),
        dataloader_pin_memory=torch.accelerator.is_available(),
    )
    with user_errors():
        training_arguments, arguments = parser.parse_args_into_dataclasses()
        check_output_folder(Path(training_arguments.output_dir))
        splits = standard_library_functions()
        splits = splits.map(to_prompt, remove_columns=splits["train"].column_names)
        trainer = SFTTrainer(
            arguments.model, training_arguments, train_dataset=splits["train"], eval_dataset=splits["validation"]
        )
    trainer.train()
    print(trainer.evaluate())
    trainer.save_model()


if __name__ == "__main__":
    run(main)
