"""
Load the checkpoints of `save.py` where the package cannot be imported: hold them to what is recorded, generate, train,
evaluate, resume and save.
"""

import json
import sys
import tempfile
import warnings
from pathlib import Path

import torch
import transformers
from transformers import PreTrainedModel, Trainer, TrainingArguments


def check_generation(model: PreTrainedModel, rows: list[list[int]], tokens: list[list[int]]) -> None:
    """A batch padded on the left, in the modes that hold the state in different ways."""
    length = max(map(len, rows))
    ids = torch.tensor([[1] * (length - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows])
    for options in ({}, {"cache_implementation": "static"}, {"prefill_chunk_size": 3}, {"use_cache": False}):
        generated = model.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False, **options)
        assert generated[:, length:].tolist() == tokens, (options, generated, tokens)
    generated = model.generate(ids[:1], max_new_tokens=6, do_sample=False, prompt_lookup_num_tokens=2)
    assert generated[:, length:].tolist() == tokens[:1], (generated, tokens)


def check_stream(model: PreTrainedModel, input_features: torch.Tensor, logits: torch.Tensor) -> None:
    """Frames that come in pieces, with the state under either name."""
    for name in ("cache", "past_key_values"):
        outputs, pieces = {}, []
        with torch.no_grad():
            for piece in input_features.split(7, dim=1):
                outputs = model(piece, **{name: outputs.get(name)}, use_cache=True)
                pieces.append(outputs.logits)
        torch.testing.assert_close(torch.cat(pieces, dim=1), logits, rtol=1e-4, atol=1e-5)


def train(model: PreTrainedModel, inputs: dict[str, torch.Tensor], folder: Path) -> None:
    """Four steps by `Trainer` with an evaluation after each; then from the second step on again, to the same weights."""
    rows = [{key: tensor[i] for key, tensor in inputs.items()} for i in range(2)]
    arguments = TrainingArguments(
        str(folder),
        max_steps=4,
        learning_rate=0.001,
        eval_strategy="steps",
        eval_steps=1,
        save_steps=2,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = Trainer(model, arguments, train_dataset=rows, eval_dataset=rows)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    after = trainer.evaluate()["eval_loss"]
    assert after < before, (before, after)
    trained = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    trainer.train(resume_from_checkpoint=str(folder / "checkpoint-2"))
    for name, tensor in trainer.model.state_dict().items():
        torch.testing.assert_close(tensor, trained[name], rtol=1e-4, atol=1e-6)
    assert trainer.predict(rows).predictions.shape[0] == 2


def main(*sources: Path) -> None:
    for source in sources:
        for path in sorted(source.glob("*.json")):
            record = json.loads(path.read_text())
            inputs = {
                key: torch.tensor(value) for key, value in record.items() if key not in ("logits", "rows", "tokens")
            }
            loader = getattr(transformers, path.stem.partition("-")[0])
            model = loader.from_pretrained(path.with_suffix(""), trust_remote_code=True)
            with torch.no_grad():
                logits = model(**inputs).logits
            torch.testing.assert_close(logits, torch.tensor(record["logits"]), rtol=1e-5, atol=1e-5)
            if "tokens" in record:
                check_generation(model, record["rows"], record["tokens"])
            if getattr(model, "can_stream", False):
                check_stream(model, inputs["input_features"], logits)
            with tempfile.TemporaryDirectory() as folder:
                train(model, inputs, Path(folder))
                again = loader.from_pretrained(Path(folder) / "checkpoint-4", trust_remote_code=True)
            with torch.no_grad():
                torch.testing.assert_close(again(**inputs).logits, model.eval()(**inputs).logits)
            print(f"{source.name} {path.stem} ok")


if __name__ == "__main__":
    # The documented way to make an import fail.
    sys.modules["modeling_sumagg"] = None
    warnings.filterwarnings("error", message=".*past_key_values", category=FutureWarning)
    main(*map(Path, sys.argv[1:]))
