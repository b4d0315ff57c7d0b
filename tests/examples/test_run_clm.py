import json
import math

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    DataCollatorWithFlattening,
)

from modeling_sumagg import SumAggConfig, ToSTTextConfig


def held_out_perplexity(folder, texts: list[str], length: int) -> float:
    """Document by document in float64, each alone and without padding."""
    model = AutoModelForCausalLM.from_pretrained(folder).double()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    losses = []
    for text in texts:
        tokens = tokenizer(text)["input_ids"] + [tokenizer.eos_token_id]
        for start in range(0, len(tokens), length):
            piece = torch.tensor([tokens[start : start + length]])
            with torch.no_grad():
                logits = model(piece).logits[0, :-1]
            losses += torch.nn.functional.cross_entropy(logits, piece[0, 1:], reduction="none").tolist()
    return math.exp(sum(losses) / len(losses))


def losses(folder) -> list[float]:
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [entry["loss"] for entry in history if "loss" in entry]


@pytest.mark.parametrize("family", ["sumagg", "tost_text"])
@pytest.mark.parametrize("packing", ["flattened", "padded"])
def test_perplexity_is_that_of_each_document_alone(
    run_script, csv_files, short_run, config_overrides, family, packing, capsys
):
    from datasets import load_dataset

    folder = run_script(
        "run_clm.py", *short_run, *csv_files, *config_overrides(family), "--packing", packing, "--block_size", 24
    )
    reported = json.loads((folder / "eval_results.json").read_text())["eval_perplexity"]
    texts = load_dataset("csv", data_files=csv_files[3], split="train", keep_default_na=False)["text"]
    assert reported == pytest.approx(held_out_perplexity(folder, texts, 24), rel=1e-4)
    assert "is no better than: unigram frequencies." in capsys.readouterr().out
    assert "unigram frequencies" in (folder / "README.md").read_text()
    assert (folder / "training.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("ending", ["txt", "jsonl", "parquet"])
@pytest.mark.parametrize("streaming", [False, True])
def test_every_kind_of_file_trains_streamed_or_not(
    run_script, tmp_path, short_run, config_overrides, ending, streaming
):
    from datasets import Dataset

    rows = Dataset.from_dict({"body": ["one two three four five six seven " * 40] * 4})
    path = tmp_path / f"text.{ending}"
    if ending == "txt":
        path.write_text("\n".join(rows["body"]))
    else:
        getattr(rows, "to_json" if ending == "jsonl" else "to_parquet")(path)
    files = ["--train_file", path, *(["--validation_file", path] if ending == "txt" else ["--held_out_rows", 1])]
    column = "text" if ending == "txt" else "body"
    folder = run_script(
        "run_clm.py", *short_run, *files, *config_overrides("sumagg"), "--block_size", 16,
        "--text_column_name", column, "--streaming", streaming,
    )  # fmt: skip
    assert json.loads((folder / "all_results.json").read_text())["eval_perplexity"] > 1
    assert len(AutoModelForCausalLM.from_pretrained(folder).config.layer_types) == 2


def test_a_preset_is_trained_with_overrides_and_a_checkpoint_is_trained_on(run_script, csv_files, short_run):
    small = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 64}
    folder = run_script(
        "run_clm.py", *short_run, *csv_files, "--preset", "sumagg-published-lm", "--block_size", 16,
        "--config_overrides", json.dumps({**small, "layer_types": ["summation"] * 3}),
    )  # fmt: skip
    config = AutoModelForCausalLM.from_pretrained(folder).config
    assert (config.norm_position, config.sum_normalization, config.hidden_size) == ("post", "none", 32)
    again = run_script(
        "run_clm.py", *short_run, *csv_files, "--model_name_or_path", folder, "--block_size", 16, output_dir="again"
    )
    losses = [json.loads((each / "all_results.json").read_text())["eval_loss"] for each in (folder, again)]
    assert losses[1] < losses[0]


@pytest.mark.parametrize(
    "config",
    [
        SumAggConfig(
            vocab_size=30,
            hidden_size=32,
            num_hidden_layers=3,
            num_attention_heads=2,
            layer_types=["summation", "sliding_attention", "full_attention"],
            sliding_window=4,
        ),
        ToSTTextConfig(
            vocab_size=30,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            layerscale_value=1.0,
            layer_types=["token_statistics", "full_attention"],
        ),
    ],
    ids=["sumagg", "tost_text"],
)
def test_flattened_documents_have_the_loss_and_gradients_of_the_padded_batch(config):
    from training_utils import train_tokenizer

    tokenizer = train_tokenizer([], 257)
    generator = torch.Generator().manual_seed(0)
    features = []
    for length in (5, 1, 11, 7):
        ids = torch.randint(30, (length,), generator=generator).tolist()
        features.append({"input_ids": ids, "labels": ids})
    model = AutoModelForCausalLM.from_config(config).double()
    results = []
    for collator in (DataCollatorForSeq2Seq(tokenizer), DataCollatorWithFlattening()):
        batch = collator([dict(feature) for feature in features], return_tensors="pt")
        model.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        results.append((loss, {name: parameter.grad.clone() for name, parameter in model.named_parameters()}))
    (padded_loss, padded), (flattened_loss, flattened) = results
    # The running sums are kept in float32.
    torch.testing.assert_close(flattened_loss, padded_loss, rtol=1e-5, atol=0)
    for name, gradient in padded.items():
        torch.testing.assert_close(flattened[name], gradient, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("family", ["sumagg", "tost_text"])
def test_training_resumes_on_the_same_loss_curve(run_script, csv_files, short_run, config_overrides, family):
    arguments = [
        *short_run, "--max_steps", 8, *csv_files, *config_overrides(family, hidden_dropout=0.1), "--logging_steps", 1,
        "--block_size", 16, "--save_strategy", "steps", "--save_steps", 3,
    ]  # fmt: skip

    whole = run_script("run_clm.py", *arguments, output_dir="whole")
    resumed = run_script(
        "run_clm.py", *arguments, "--resume_from_checkpoint", whole / "checkpoint-3", output_dir="resumed"
    )
    assert len(losses(whole)) == 8 and losses(whole)[-1] < losses(whole)[0]
    assert losses(resumed) == losses(whole)
    assert (resumed / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()


def test_the_options_of_trainer_reach_the_models(run_script, csv_files, short_run, config_overrides):
    """bf16 weights and autocast, accumulated gradients and activation checkpointing, on one run."""
    folder = run_script(
        "run_clm.py", *short_run, *csv_files, *config_overrides("sumagg"), "--block_size", 16, "--bf16", True, "--use_cpu", True,
        "--gradient_accumulation_steps", 2, "--gradient_checkpointing", True, "--dtype", "bfloat16",
    )  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.dtype == torch.bfloat16
    assert json.loads((folder / "all_results.json").read_text())["eval_loss"] < math.log(300)


@pytest.mark.parametrize("family", ["sumagg", "tost_text"])
def test_autocast_to_bfloat16_has_the_losses_of_float32_up_to_rounding(
    run_script, csv_files, short_run, config_overrides, family
):
    arguments = [
        *short_run, "--max_steps", 20, *csv_files, *config_overrides(family), "--logging_steps", 1, "--block_size", 16,
        "--learning_rate", 5e-3, "--use_cpu", True,
    ]  # fmt: skip
    exact = run_script("run_clm.py", *arguments, output_dir="float32")
    rounded = run_script("run_clm.py", *arguments, "--bf16", True, output_dir="bfloat16")
    assert AutoModelForCausalLM.from_pretrained(rounded).dtype == torch.float32
    assert losses(exact)[-1] < losses(exact)[0] - 1
    assert losses(rounded) != losses(exact)
    # bfloat16 has 8 bits: one part in 256.
    assert losses(rounded) == pytest.approx(losses(exact), rel=1 / 256)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["sumagg", "tost_text"])
def test_compiled_training_has_the_losses_of_eager_training(
    run_script, csv_files, short_run, config_overrides, family
):
    arguments = [
        *short_run, *csv_files, *config_overrides(family), "--logging_steps", 1, "--block_size", 16, "--use_cpu", True,
        "--learning_rate", 5e-3,
    ]  # fmt: skip
    eager = run_script("run_clm.py", *arguments, output_dir="eager")
    torch._dynamo.utils.counters.clear()
    compiled = run_script("run_clm.py", *arguments, "--torch_compile", True, output_dir="compiled")
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    assert losses(eager)[-1] < losses(eager)[0] - 0.1
    assert losses(compiled) == pytest.approx(losses(eager), abs=1e-4)
