import importlib.util
import json
import math
import re
import shlex
import signal

import numpy as np
import pytest
import torch
from datasets import load_dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftConfig
from PIL import Image
from running import EXAMPLES, assert_card_is_true, config_overrides, losses, metrics, read_card
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    DataCollatorWithFlattening,
    GPT2Tokenizer,
    TrainingArguments,
)
from transformers.tokenization_utils_base import VERY_LARGE_INTEGER

from modeling_sumagg import SumAggConfig, ToSTTextConfig
from modeling_sumagg.models.families import FAMILIES
from modeling_sumagg.training import decay_parameter_names, scripts
from modeling_sumagg.training.scripts import DecayTrainer


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("run_clm", EXAMPLES / "run_clm.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


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


@pytest.mark.parametrize(("family", "packing"), [("sumagg", "flattened"), ("tost_text", "padded"), ("gpt2", "padded")])
def test_perplexity_is_that_of_each_document_alone(language_model, csv_files, family, packing):
    run = language_model(family, packing)
    texts = load_dataset("csv", data_files=str(csv_files[3]), split="train", keep_default_na=False)["text"]
    assert metrics(run.folder)["eval_perplexity"] == pytest.approx(
        held_out_perplexity(run.folder, texts, 24), rel=1e-4
    )
    tokenizer = AutoTokenizer.from_pretrained(run.folder)
    # Sums that decay need no positions, and so have no limit.
    longest = VERY_LARGE_INTEGER if family == "sumagg" else 128
    assert (tokenizer.padding_side, tokenizer.model_max_length) == ("left", longest)
    assert re.search(r"Perplexity +validation\n +[\d.]+  this model\n +[\d.]+  unigram frequencies", run.printed)
    assert "The model is no better than: unigram frequencies." in run.printed
    assert np.asarray(Image.open(run.folder / "training.png").convert("L")).std() > 5
    if family not in FAMILIES:
        assert not (run.folder / "README.md").exists()
        return
    measured = {"perplexity": metrics(run.folder)["eval_perplexity"]}
    card = assert_card_is_true(
        run.folder, run.printed, measured, ["unigram frequencies"], learning_rate=0.002, per_device_train_batch_size=4
    )
    # Documents in pieces of 24 tokens, of which a single one predicts nothing.
    lengths = {}
    for split, file in (("train", csv_files[1]), ("validation", csv_files[3])):
        texts = load_dataset("csv", data_files=str(file), split="train", keep_default_na=False)["text"]
        counts = [len(tokenizer(text)["input_ids"]) + 1 for text in texts]
        lengths[split] = sum(count // 24 + (count % 24 > 1) for count in counts)
    assert card.training["data"] == f"train.csv, {lengths['train']:,} examples"
    assert (card.measured_on, card.num_examples) == ("validation.csv", lengths["validation"])
    assert card.data.eval_results[0].dataset_name == "validation.csv"
    prompt = re.search(r'tokenizer\("(.*)", return_tensors', card.text)[1]
    assert prompt and texts[0].startswith(prompt)


@pytest.mark.parametrize("packing", ["blocks", "flattened"])
def test_chunks_train_and_evaluate_as_whole_sequences_do(run_script, csv_files, short_run, packing):
    arguments = [*short_run, *csv_files, *config_overrides("sumagg"), "--packing", packing, "--block_size", 100000]
    whole, chunks = (
        run_script("run_clm.py", *arguments, "--chunk_length", length, output_dir=f"out-{length}")
        # The first is longer than any sequence.
        for length in (1000000, 7)
    )
    assert losses(chunks.folder) == pytest.approx(losses(whole.folder), rel=1e-4)
    for name in ("eval_loss", "eval_perplexity"):
        assert metrics(chunks.folder)[name] == pytest.approx(metrics(whole.folder)[name], rel=1e-4)


def test_the_first_line_says_what_it_will_do(language_model, csv_files):
    first, *warnings, fourth = language_model("sumagg", "flattened").printed.splitlines()[:4]
    assert first == "Trains a language model on train.csv and saves it to out (the progress bar shows how long)."
    # The fourth row of each file has no text.
    for warning, file in zip(warnings, (csv_files[1], csv_files[3]), strict=True):
        assert warning.startswith(f"warning: {file}, line 5: 'text' is empty; --drop_incomplete_rows")
    assert re.fullmatch(r"SumAggForCausalLM, [\d,]+ parameters; a tokenizer of \d+ tokens\.", fourth)


def test_unigram_perplexity(script):
    training, held_out = [{"input_ids": [0, 1, 1, 1]}, {"input_ids": [1, 2]}], [{"input_ids": [2, 1, 0]}]
    # Of 6 tokens and 4 of the smoothing: 0 twice, 1 five times.
    expected = math.exp(-(math.log(5 / 10) + math.log(2 / 10)) / 2)
    assert script.unigram_perplexity(training, held_out, 4) == pytest.approx(expected)


class OneTokenPerCharacter:
    eos_token_id = 0

    def __call__(self, texts, add_special_tokens):
        return {"input_ids": [[ord(character) for character in text] for text in texts]}


@given(texts=st.lists(st.text("abc", max_size=12), max_size=8), block_size=st.integers(2, 7))
def test_blocks_are_the_joined_documents(script, texts, block_size):
    blocks = script.to_sequences(texts, OneTokenPerCharacter(), "blocks", block_size)["input_ids"]
    joined = [token for text in texts for token in (*map(ord, text), 0)]
    assert all(len(block) == block_size for block in blocks)
    assert [token for block in blocks for token in block] == joined[: len(joined) // block_size * block_size]


@given(text=st.text(), vocab_size=st.sampled_from([300, 400]))
@settings(deadline=None, max_examples=30)
def test_the_learned_tokenizer_gives_every_text_back(text, vocab_size):
    tokenizer = GPT2Tokenizer(pad_token="<|endoftext|>").train_new_from_iterator(
        ["def run(self):\n        return self.value\n" * 3], vocab_size, show_progress=False
    )
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_trainer_decays_maps_and_embeddings_and_nothing_else(script, tmp_path):
    model = AutoModelForCausalLM.from_config(ToSTTextConfig(vocab_size=20, hidden_size=32, num_attention_heads=2))
    trainer = script.ChunkTrainer(model, TrainingArguments(str(tmp_path), weight_decay=0.1, report_to="none"))
    trainer.create_optimizer()
    decayed, rest = trainer.optimizer.param_groups
    assert (decayed["weight_decay"], rest["weight_decay"]) == (0.1, 0.0)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert {names[id(parameter)] for parameter in decayed["params"]} == set(decay_parameter_names(model))
    assert len(decayed["params"]) + len(rest["params"]) == len(names)


def test_a_stream_is_trained_on(run_script, tmp_path, short_run):
    rows = [json.dumps({"body": "one two three four five six seven " * 40})] * 4
    (tmp_path / "text.jsonl").write_text("\n".join(rows))
    run = run_script(
        "run_clm.py", *short_run, *config_overrides("sumagg"), "--train_file", "text.jsonl", "--held_out_rows", 1,
        "--text_column_name", "body", "--streaming", "--block_size", 16,
    )  # fmt: skip
    assert metrics(run.folder)["eval_perplexity"] > 1


def test_a_preset_is_trained_with_overrides(run_script, csv_files, short_run):
    small = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 64}
    run = run_script(
        "run_clm.py", *short_run, *csv_files, "--preset", "sumagg-published-lm", "--block_size", 16,
        "--config_overrides", json.dumps({**small, "layer_types": ["summation"] * 3}),
    )  # fmt: skip
    config = AutoModelForCausalLM.from_pretrained(run.folder).config
    assert (config.norm_position, config.sum_normalization, config.hidden_size) == ("post", "none", 32)


def test_lora_goes_on_from_a_checkpoint_and_is_merged(
    language_model, run_script, csv_files, short_run, in_a_clean_process
):
    base = language_model("sumagg", "flattened")
    run = run_script(
        "run_clm.py", *short_run, *csv_files, "--model_name_or_path", base.folder, "--packing", "flattened",
        "--block_size", 24, "--lora_rank", 4, "--learning_rate", 2e-2, "--max_steps", 20,
    )  # fmt: skip
    before, after = (metrics(each.folder)["eval_perplexity"] for each in (base, run))
    assert after < before - 1
    assert f"{before:.4g}  before training" in run.printed
    assert PeftConfig.from_pretrained(run.folder).target_modules == set(FAMILIES["sumagg"].lora_target_modules)
    # Merged into plain weights, it is the same model.
    texts = load_dataset("csv", data_files=str(csv_files[3]), split="train", keep_default_na=False)["text"]
    assert held_out_perplexity(run.folder / "merged", texts, 24) == pytest.approx(after, rel=1e-3)
    # Cards of ours, for the adapters too, which name the base without the folders above it.
    for folder in (run.folder, run.folder / "merged"):
        card = read_card(folder)
        assert "unigram frequencies" in card.results and card.data.base_model == base.folder.name
        assert str(base.folder) not in (folder / "README.md").read_text()
    assert [str(folder) for folder in in_a_clean_process[-2:]] == ["out", "out/merged"]
    assert not [line for line in run.printed.splitlines() if "Warning" in line]


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
    tokenizer = GPT2Tokenizer(pad_token="<|endoftext|>")
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


@pytest.mark.parametrize("family", ["sumagg", pytest.param("tost_text", marks=pytest.mark.slow)])
def test_training_resumes_on_the_same_loss_curve(
    run_script, error_of, csv_files, short_run, family, monkeypatch, capsys
):
    arguments = [
        *short_run, "--max_steps", 8, *csv_files, *config_overrides(family, hidden_dropout=0.1), "--logging_steps", 1,
        "--block_size", 16, "--save_strategy", "steps", "--save_steps", 3,
    ]  # fmt: skip

    whole = run_script("run_clm.py", *arguments, output_dir="whole").folder
    resumed = run_script(
        "run_clm.py", *arguments, "--resume_from_checkpoint", whole / "checkpoint-3", output_dir="resumed"
    ).folder
    assert len(losses(whole)) == 8 and losses(whole)[-1] < losses(whole)[0]
    assert losses(resumed) == losses(whole)
    assert (resumed / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()

    # At Ctrl-C in the sixth step a checkpoint is written, and the line at the end resumes it.
    step = DecayTrainer.training_step
    calls = []

    def interrupted_step(*args, **kwargs):
        calls.append(1)
        if len(calls) == 6:
            signal.raise_signal(signal.SIGINT)
        return step(*args, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(SystemExit, match="130"):
        patch.setattr(DecayTrainer, "training_step", interrupted_step)
        run_script("run_clm.py", *arguments[:-4], output_dir="stopped")
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    message = capsys.readouterr().err.strip().splitlines()[-1]
    said, command = message.split(" Resume with: python run_clm.py ")
    assert said == "interrupted: checkpoint-6 is in stopped."
    folder = run_script("run_clm.py", *shlex.split(command), output_dir="stopped").folder
    assert losses(folder) == losses(whole)
    assert (folder / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    # A new run does not mix its checkpoints with those.
    error = error_of("run_clm.py", *arguments, output_dir="stopped")
    assert "stopped holds checkpoint-6 of an earlier run: resume it with --resume_from_checkpoint last" in error


@pytest.mark.parametrize("times", [1, 2])
def test_ctrl_c_ends_with_one_line(run_script, csv_files, short_run, monkeypatch, capsys, times):
    """Before the training, and twice in it."""

    def interrupt(*args, **kwargs):
        for _ in range(times):
            signal.raise_signal(signal.SIGINT)

    target = (DecayTrainer, "training_step") if times == 2 else (scripts, "load_splits")
    monkeypatch.setattr(*target, interrupt)
    with pytest.raises(SystemExit, match="130"):
        run_script("run_clm.py", *short_run, *csv_files, *config_overrides("sumagg"), "--block_size", 16)
    errors = capsys.readouterr().err
    assert "Traceback" not in errors
    expected = "interrupted: no checkpoint was written, so that the training can only start again."
    assert errors.strip().splitlines()[-1] == (expected if times == 2 else "interrupted.")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--learning_rat", 1], r"not used .*'--learning_rat'"),
        (
            ["--config_overrides", '{"hiden_size": 64}'],
            r"SumAggConfig has no field 'hiden_size'. Did you mean 'hidden_size'\?",
        ),
        (["--streaming"], "--streaming needs --max_steps"),
        (["--block_size", 100_000], "makes 0 training and 0 held-out sequences.*smaller --block_size"),
    ],
)
def test_what_cannot_be_trained_is_said_in_one_line(error_of, csv_files, arguments, message):
    assert re.search(message, error_of("run_clm.py", *csv_files, "--vocab_size", 300, *arguments))


@pytest.mark.slow
def test_the_options_of_trainer_reach_the_models(run_script, csv_files, short_run):
    """bf16 weights and autocast, accumulated gradients and activation checkpointing, on one run."""
    run = run_script(
        "run_clm.py", *short_run, *csv_files, *config_overrides("sumagg"), "--block_size", 16, "--bf16", True, "--use_cpu", True,
        "--gradient_accumulation_steps", 2, "--gradient_checkpointing", True, "--dtype", "bfloat16",
    )  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(run.folder)
    assert model.dtype == torch.bfloat16
    assert metrics(run.folder)["eval_loss"] < math.log(300)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["sumagg", "tost_text"])
def test_autocast_to_bfloat16_has_the_losses_of_float32_up_to_rounding(run_script, csv_files, short_run, family):
    arguments = [
        *short_run, "--max_steps", 20, *csv_files, *config_overrides(family), "--logging_steps", 1, "--block_size", 16,
        "--learning_rate", 5e-3, "--use_cpu", True,
    ]  # fmt: skip
    exact = run_script("run_clm.py", *arguments, output_dir="float32").folder
    rounded = run_script("run_clm.py", *arguments, "--bf16", True, output_dir="bfloat16").folder
    assert AutoModelForCausalLM.from_pretrained(rounded).dtype == torch.float32
    assert losses(exact)[-1] < losses(exact)[0] - 1
    assert losses(rounded) != losses(exact)
    # bfloat16 has 8 bits: one part in 256.
    assert losses(rounded) == pytest.approx(losses(exact), rel=1 / 256)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["sumagg", "tost_text"])
def test_compiled_training_has_the_losses_of_eager_training(run_script, csv_files, short_run, family):
    arguments = [
        *short_run, *csv_files, *config_overrides(family), "--logging_steps", 1, "--block_size", 16, "--use_cpu", True,
        "--learning_rate", 5e-3,
    ]  # fmt: skip
    eager = run_script("run_clm.py", *arguments, output_dir="eager").folder
    torch._dynamo.utils.counters.clear()
    compiled = run_script("run_clm.py", *arguments, "--torch_compile", True, output_dir="compiled").folder
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    assert losses(eager)[-1] < losses(eager)[0] - 0.1
    assert losses(compiled) == pytest.approx(losses(eager), abs=1e-4)
