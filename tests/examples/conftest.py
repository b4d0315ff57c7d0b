"""What the tests of the scripts share: their runs, and the texts that they are trained on."""

import csv
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from running import Run, config_overrides, run_alone


for requirement in ("datasets", "matplotlib", "peft", "sklearn"):
    pytest.importorskip(requirement)

WORDS = {"cat": ["meow", "purr", "claw", "fish"], "dog": ["bark", "woof", "paw", "bone"]}


@pytest.fixture(scope="session", autouse=True)
def without_network() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        yield


@pytest.fixture(scope="session")
def in_a_clean_process() -> Iterator[list[Path]]:
    """The folders that a card was written to. Loading them in a clean process is tested by tests/hub, and here once."""
    import modeling_sumagg.publishing.cards as cards

    folders: list[Path] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cards, "check_folder", folders.append)
        yield folders


@pytest.fixture
def run_script(tmp_path, in_a_clean_process) -> Callable[..., Run]:
    """`run_script("run_clm.py", "--max_steps", 3)` runs it in an empty folder."""
    return lambda name, *arguments, **options: run_alone(name, tmp_path, *arguments, **options)


@pytest.fixture
def error_of(run_script) -> Callable[..., str]:
    """The message with which a script ends: of users' errors, one line."""

    def error(name: str, *arguments: object, **options) -> str:
        with pytest.raises(SystemExit) as ending:
            run_script(name, *arguments, **options)
        message = str(ending.value.code)
        assert message.startswith("error: ") and "\n" not in message
        return message

    return error


@pytest.fixture(scope="session")
def csv_folder(tmp_path_factory) -> Path:
    """`train.csv` and `validation.csv`, texts of two vocabularies, one text of each file empty."""
    folder = tmp_path_factory.mktemp("texts")
    draw = random.Random(0)
    for split, rows in (("train", 60), ("validation", 20)):
        with (folder / f"{split}.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["text", "label", f"only in {split}"])
            for row in range(rows):
                label = draw.choice(sorted(WORDS))
                text = " ".join(draw.choices(WORDS[label], k=0 if row == 3 else draw.randint(3, 40)))
                writer.writerow([text, label, row])
    return folder


@pytest.fixture(scope="session")
def csv_files(csv_folder) -> list[object]:
    return ["--train_file", csv_folder / "train.csv", "--validation_file", csv_folder / "validation.csv"]


@pytest.fixture(scope="session")
def short_run() -> list[object]:
    return [
        "--max_steps", 5, "--per_device_train_batch_size", 4, "--per_device_eval_batch_size", 20, "--vocab_size", 300,
        "--eval_strategy", "no", "--disable_tqdm", True,
    ]  # fmt: skip


@pytest.fixture(scope="session")
def language_model(tmp_path_factory, csv_files, short_run, in_a_clean_process) -> Callable[[str, str], Run]:
    """`language_model(family, packing)`: what run_clm.py trained, once for all tests."""
    runs: dict[tuple[str, str], Run] = {}

    def run(family: str, packing: str) -> Run:
        if (family, packing) not in runs:
            runs[family, packing] = run_alone(
                "run_clm.py", tmp_path_factory.mktemp(family), *short_run, *csv_files, *config_overrides(family),
                "--packing", packing, "--block_size", 24,
            )  # fmt: skip
        return runs[family, packing]

    return run
