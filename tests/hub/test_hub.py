"""Model cards, and the check of a folder before it is uploaded."""

import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from checkpoints import code_file, save_with_outputs, text_config
from huggingface_hub import ModelCard
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from testing import (
    build,
    multimodal_config,
    speech_config,
    speech_processor,
    sumagg_config,
    tost_config,
    tost_text_config,
)
from torch import nn
from transformers import AutoModelForSequenceClassification, GPT2Config, GPT2LMHeadModel

from modeling_sumagg import (
    SumAggConfig,
    SumAggForAudioClassification,
    SumAggForCausalLM,
    SumAggForCTC,
    SumAggForMultimodalRegression,
    SumAggForSequenceClassification,
    SumAggForTokenClassification,
    SumAggModel,
    ToSTForCausalLM,
    ToSTForImageClassification,
    __main__,
)
from modeling_sumagg.publishing import cards, folder_checks
from modeling_sumagg.publishing.clean_process import check_checkpoint, what_it_becomes
from modeling_sumagg.publishing.folder_checks import check_files
from modeling_sumagg.publishing.hub import (
    check_card,
    check_folder,
    create_model_card,
    decode_state_size,
    save_model_card,
)


RUN = {
    "model_id": "user/model",
    "dataset_type": "wikitext",
    "dataset_name": "Wikitext, 2 MB",
    "steps": 100,
    "hyperparameters": {"learning rate": 1e-3, "batch size": 8},
    "metrics": {"perplexity": 12.345, "accuracy": 0.5},
    "baselines": {"feed-forward only": {"perplexity": 23.456, "accuracy": 0.25}},
}


@pytest.mark.parametrize(
    ("model_class", "config", "pipeline_tag", "auto_class", "source"),
    [
        (SumAggForCausalLM, text_config, "text-generation", "AutoModelForCausalLM", "Ekin"),
        (
            SumAggForSequenceClassification,
            text_config,
            "text-classification",
            "AutoModelForSequenceClassification",
            "Ekin",
        ),
        (
            SumAggForMultimodalRegression,
            multimodal_config,
            "tabular-regression",
            "AutoModelForSequenceClassification",
            "Ekin",
        ),
        (SumAggForCTC, speech_config, "automatic-speech-recognition", "AutoModelForCTC", "Ekin"),
        (
            SumAggForAudioClassification,
            speech_config,
            "audio-classification",
            "AutoModelForAudioClassification",
            "Ekin",
        ),
        (ToSTForCausalLM, tost_text_config, "text-generation", "AutoModelForCausalLM", "2412.17810"),
        (
            ToSTForImageClassification,
            tost_config,
            "image-classification",
            "AutoModelForImageClassification",
            "2412.17810",
        ),
    ],
)
def test_the_card_says_what_was_run(tmp_path, model_class, config, pipeline_tag, auto_class, source):
    model = build(model_class, config())
    create_model_card(model, **RUN, limits="Knows no verbs.", hardware="a pocket calculator").save(
        tmp_path / "card.md"
    )
    card = ModelCard.load(tmp_path / "card.md")
    assert card.data.library_name == "transformers"
    assert card.data.license == "apache-2.0"
    assert card.data.pipeline_tag == pipeline_tag
    assert model.config.model_type in card.data.tags
    assert {(r.metric_type, r.metric_value) for r in card.data.eval_results} == {
        ("perplexity", 12.345),
        ("accuracy", 0.5),
    }
    assert {(r.dataset_type, r.task_type) for r in card.data.eval_results} == {("wikitext", pipeline_tag)}
    for text in (
        f'{auto_class}.from_pretrained(\n    "user/model",\n    revision="<commit hash>",\n    trust_remote_code=True',
        "| data | Wikitext, 2 MB |",
        "| optimizer steps | 100 |",
        "| learning rate | 0.001 |\n| batch size | 8 |",
        "| hardware | a pocket calculator |",
        "| | perplexity (per token) | accuracy (fraction) |\n|---|---:|---:|\n| **this model** | 12.35 | 0.5 |\n"
        "| feed-forward only | 23.46 | 0.25 |",
        f"| parameters | {sum(p.numel() for p in model.parameters()):,} |",
        "Knows no verbs.",
        source,
    ):
        assert text in card.text, text
    assert "{{" not in card.text and "{%" not in card.text and "\n\n\n\n" not in card.text
    assert check_card(tmp_path / "card.md")


@pytest.mark.parametrize(
    ("config", "length", "limit"),
    [
        (sumagg_config(position_embedding_type="learned"), "64 tokens", True),
        (sumagg_config(position_embedding_type="sinusoidal"), "unlimited", False),
        (tost_text_config(), "64 tokens", True),
        (tost_text_config(position_embedding_type="none"), "64 tokens", True),
        (tost_text_config(position_embedding_type="none", use_membership_bias=False), "unlimited", False),
    ],
)
def test_the_card_names_context_length_units_and_a_sample_and_generates(config, length, limit):
    model = build(SumAggForCausalLM if config.model_type == "sumagg" else ToSTForCausalLM, config)
    units = {"perplexity": "per character"}
    card = create_model_card(model, **RUN, units=units, sample="To be, or not\n\nto be")
    for text in (
        f"| context length | {length} |",
        "| | perplexity (per character) | accuracy (fraction) |",
        "## Sample\n\n~~~text\nTo be, or not\n\nto be\n~~~\n",
        'tokenizer("<the beginning of a text>", return_tensors="pt")\ntokens = model.generate(**inputs, max_new_tokens=50)\n',
        "skip_special_tokens=True",
    ):
        assert text in card.text, text
    assert ("longer input is refused" in card.text) == limit
    limits = card.text.partition("## Limits")[2].partition("## Citation")[0].strip()
    assert all(line.startswith("- ") for line in limits.splitlines()), limits


def test_cards_of_other_tasks_do_not_generate():
    for model in (
        build(SumAggForSequenceClassification, text_config()),
        build(ToSTForImageClassification, tost_config()),
    ):
        text = create_model_card(model, **RUN).text
        assert "generate(" not in text and "## Sample" not in text
        assert ("context length" in text) == hasattr(model.config, "vocab_size")


def test_state_size_is_what_the_cache_holds():
    # 2 summation layers with 2 matrices of 8 x 8 float32, and the last 3 inputs of a convolution over 16 values, 16 entries
    # of keys and 16 of queries; and 1 attention layer with 2 x 16 float32 a token.
    sizes = (2 * (2 * 8 * 8 * 4 + 3 * 48 * 4), 2 * 16 * 4)
    assert decode_state_size(build(SumAggForCausalLM, sumagg_config("hybrid"))) == sizes
    # A full window of 5 tokens holds the keys and values of 4 before the next one.
    sizes = (2 * 8 * 8 * 4 + 3 * 48 * 4 + 4 * 2 * 16 * 4, 0)
    assert decode_state_size(build(SumAggForCausalLM, sumagg_config("sliding"))) == sizes
    # Without keys: 16 float64, the weights of 2 heads, and the last 3 inputs of a convolution of 16 channels.
    vector = sumagg_config("pure", sum_state_size=None)
    assert decode_state_size(build(SumAggForCausalLM, vector)) == (2 * (18 * 8 + 3 * 16 * 4), 0)
    plain = sumagg_config("pure", **SumAggConfig.values_of_0_1)
    assert decode_state_size(build(SumAggForCausalLM, plain)) == (2 * 16 * 8, 0)
    # 2 layers of 2 heads of 8 channels: two sums of squares a channel, and one of memberships a head.
    assert decode_state_size(build(ToSTForCausalLM, tost_text_config("pure"))) == (2 * (2 * 16 + 2) * 8, 0)
    assert decode_state_size(build(ToSTForImageClassification, tost_config())) is None
    # Two summation layers without convolutions, and 5 frames of 5 bins in float32 with their number, which is an int64.
    speech = build(SumAggForCTC, speech_config("pure"))
    assert decode_state_size(speech) == (2 * 18 * 8 + 5 * 5 * 4 + 8, 0)
    assert decode_state_size(build(SumAggForCTC, speech_config("pure", is_causal=False))) is None
    assert decode_state_size(build(SumAggForAudioClassification, speech_config("pure"))) is None


def test_cards_that_would_hide_something_are_refused():
    model = build(SumAggForCausalLM, text_config())
    with pytest.raises(ValueError, match="`metrics` is empty"):
        create_model_card(model, **RUN | {"metrics": {}})
    with pytest.raises(ValueError, match="`baselines` is empty"):
        create_model_card(model, **RUN | {"baselines": {}})
    with pytest.raises(ValueError, match="feed-forward only.*perplexity"):
        create_model_card(model, **RUN | {"baselines": {"feed-forward only": {"perplexity": 1.0}}})
    with pytest.raises(
        ValueError, match=r"`units` names \['loss'\], and the metrics are \['accuracy', 'perplexity'\]"
    ):
        create_model_card(model, **RUN, units={"loss": "nats"})
    other = GPT2LMHeadModel(GPT2Config(vocab_size=11, n_embd=8, n_layer=1, n_head=2))
    with pytest.raises(
        ValueError, match="GPT2LMHeadModel is a class of none of the registered families, which are sumagg"
    ):
        create_model_card(other, **RUN)
    with pytest.raises(ValueError, match="names no base model"):
        create_model_card(get_peft_model(model, LoraConfig()), **RUN)


def test_cards_that_lack_something_fail_the_check(tmp_path):
    needed = r"`license` \(such as .*`library_name`.*`pipeline_tag`.*`tags`.*`model-index`.*`save_model_card` of"
    with pytest.raises(ValueError, match=f"README.md is missing. .*{needed}"):
        check_card(tmp_path / "README.md")
    card = create_model_card(build(SumAggForCausalLM, text_config()), **RUN)
    del card.data.license, card.data.tags
    card.save(tmp_path / "README.md")
    with pytest.raises(ValueError, match=f"has no `license`, `tags`. .*{needed}"):
        check_card(tmp_path / "README.md")


CARDS = {
    "broken": "a: [",
    "a tab": "\ta: b",
    "a list": "- a",
    "code": "license: !!python/object/apply:os.system ['touch ran']",
    "results that are text": "license: x\npipeline_tag: y\ntags: [a]\neval_results: [a]",
    "an index that is a number": "license: x\npipeline_tag: y\ntags: [a]\nmodel-index: 5",
}


@pytest.mark.parametrize("kind", CARDS)
def test_metadata_that_is_none_is_one_line(kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "README.md").write_text(f"---\n{CARDS[kind]}\n---\n")
    with pytest.raises(
        ValueError, match="The metadata of .*README.md (cannot be read: .*|has no .*)A card begins with"
    ):
        check_card(tmp_path / "README.md")
    assert not (tmp_path / "ran").exists()


def test_a_card_does_not_command_the_terminal(tmp_path):
    card = create_model_card(
        build(SumAggForCausalLM, text_config()), **RUN | {"dataset_name": "\x1b[2J\x1b]0;title\a"}
    )
    card.save(tmp_path / "README.md")
    (line,) = check_card(tmp_path / "README.md")
    assert line.isprintable() and "[2J" in line


def test_the_kept_cards_are_whole():
    for path in (Path(__file__).parents[2] / "hub_cards" / "runs").glob("*.md"):
        assert check_card(path)


def touch(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("{}" if name.endswith(".json") else "")
    return folder


@pytest.mark.parametrize(
    ("names", "reason"),
    [
        ([], "it is not a checkpoint. It is empty."),
        (["a.py", "b"], "It holds a.py, b."),
        (["abc"[i % 3] * (i + 1) for i in range(9)], r"It holds a, aaaa, aaaaaaa, bb, bbbbb …\."),
        (
            ["checkpoint-5/config.json", "merged/config.json"],
            "Checkpoints are in it, checkpoint-5, merged: check one of",
        ),
        (["model.safetensors"], "It holds weights alone: save the model with `save_pretrained`"),
        (["best.pth"], "It holds best.pth: convert it by `python -m modeling_sumagg convert`"),
        (["config.json"], "has no `auto_map`, so this is a model of the type None without code"),
        (["adapter_config.json"], "names no base model"),
    ],
)
def test_a_folder_that_is_no_checkpoint_is_told_apart(names, reason, tmp_path):
    with pytest.raises(ValueError, match=reason):
        check_files(touch(tmp_path, *names))


def test_what_is_no_folder_is_told_apart(tmp_path):
    for name, what in (("missing", "missing"), ("file", "a file")):
        (tmp_path / "file").touch()
        with pytest.raises(ValueError, match=f"{name} is {what}: give the folder of a checkpoint"):
            check_files(tmp_path / name)


def test_a_folder_that_is_no_checkpoint_costs_no_import_of_torch(tmp_path):
    """A second at most, where importing the models takes ten."""
    (tmp_path / "torch.py").write_text("raise RuntimeError('torch was imported')")
    (tmp_path / "folder").mkdir()
    command = [sys.executable, "-m", "modeling_sumagg", "check", tmp_path / "folder"]
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    process = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert process.returncode == 1
    assert process.stderr == f"error: {tmp_path}/folder holds no config.json: it is not a checkpoint. It is empty.\n"
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before < 1


def test_files_that_must_not_be_uploaded(tmp_path):
    with pytest.raises(ValueError, match="no config.json"):
        check_files(tmp_path)
    whole = tmp_path / "whole"
    build(SumAggForCausalLM, text_config()).save_pretrained(whole)
    check_files(whole)
    truncated = shutil.copytree(whole, tmp_path / "truncated")
    weights = (truncated / "model.safetensors").read_bytes()
    (truncated / "model.safetensors").write_bytes(weights[:-1])
    with pytest.raises(ValueError, match="model.safetensors is truncated or corrupted"):
        check_files(truncated)
    torch.save({}, whole / "training_args.bin")
    check_files(whole)
    torch.save(nn.Linear(1, 1).state_dict(), whole / "pytorch_model.bin")
    with pytest.raises(ValueError, match="pytorch_model.bin"):
        check_files(whole)


def check(folder: Path) -> None:
    __main__.main(["check", str(folder)])


@pytest.fixture
def checks_in_this_process(monkeypatch):
    """
    `save_model_card` without a process of ten seconds for each kind of folder: that one is started, and cannot import
    the package, is tested below for a language model, by the slow tests for an adapter, and for the code of every class
    by `test_self_contained.py`.
    """

    def check_folder(folder: Path) -> None:
        check_checkpoint(folder)
        print(*check_card(folder / "README.md"), sep="\n")

    monkeypatch.setattr(cards, "check_folder", check_folder)


def without_model_id_and_type() -> dict:
    return {name: value for name, value in RUN.items() if name not in ("model_id", "dataset_type")}


def test_one_call_writes_the_card_and_checks_the_folder_in_a_clean_process(tmp_path, monkeypatch, capfd):
    model, folder = build(SumAggForCausalLM, text_config()), tmp_path / "model"
    with pytest.raises(ValueError, match="model holds no model: save it there first"):
        save_model_card(model, folder, **without_model_id_and_type())
    save_with_outputs(model, folder)
    torch.save({}, touch(folder, "checkpoint-1/config.json") / "training_args.bin")
    (folder / "README.md").write_text("# My project\n")
    with pytest.raises(ValueError, match="README.md is no model card, .* would be overwritten: move it away"):
        save_model_card(model, folder, **without_model_id_and_type())
    assert (folder / "README.md").read_text() == "# My project\n"
    # Such as `Trainer.push_to_hub` writes.
    (folder / "README.md").write_text("---\nlicense: mit\n---\n")
    card = save_model_card(model, folder, **without_model_id_and_type())
    assert (folder / "README.md").read_text() == str(card)
    assert '.from_pretrained(\n    "model",' in card.text
    assert {(result.dataset_type, result.dataset_name) for result in card.data.eval_results} == {
        ("other", "Wikitext, 2 MB")
    }
    printed = capfd.readouterr().out
    for text in (
        "AutoModelForCausalLM: SumAggForCausalLM",
        "as AutoModel: whole\n",
        "as AutoModelForMaskedLM: cannot be made: A masked language model sees both sides: set `is_causal=False`",
        "as AutoModelForSequenceClassification: its head would be random, and has to be trained first: the checkpoint has "
        "no pooler.proj.weight, score.bias, score.weight\n",
        "forward: [1, 8, 61]",
        "finite",
        "generate: [",
        "tokenizer: ",
        "takes `trust_remote_code=True` as the model does",
        "card: text-generation, license apache-2.0, perplexity 12.345",
        f"upload it by: hf upload USER/NAME {folder} --exclude training_args.bin --exclude 'checkpoint-*/*'\n",
    ):
        assert text in printed, printed


@pytest.mark.slow
def test_code_that_ends_the_process_fails_the_check(tmp_path):
    build(SumAggForCausalLM, text_config()).save_pretrained(tmp_path)
    with code_file(tmp_path, "configuration_sumagg").open("a") as file:
        file.write("\nimport sys\n\nsys.exit(0)\n")
    with pytest.raises(ValueError, match="ended the process that loaded it: it calls `sys.exit` or the like"):
        check_folder(tmp_path)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("import os; os.kill(os.getpid(), 9)", "was killed by SIGKILL, which the system does where memory runs out"),
        ("import os; os._exit(3)", "ended with the status 3"),
        ("import sys; sys.exit(0)", "ended the process that loaded it: it calls `sys.exit` or the like"),
        ("import sys; sys.exit('first\\nValueError: \\x1b[2Jlast')", r"^ValueError: \\x1b\[2Jlast$"),
    ],
)
def test_a_process_that_ends_early_fails_the_check(tmp_path, monkeypatch, line, reason):
    (tmp_path / "clean_process.py").write_text(line)
    monkeypatch.setattr(folder_checks, "__file__", str(tmp_path / "folder_checks.py"))
    monkeypatch.setattr(folder_checks, "check_files", lambda folder: None)
    with pytest.raises(ValueError, match=reason):
        check_folder(tmp_path)


def test_the_check_says_which_heads_are_trained():
    model = build(
        SumAggForSequenceClassification, text_config(tie_word_embeddings=False, architectures=["Classifier"])
    )
    saved = model.state_dict()
    assert what_it_becomes(SumAggModel, model.config, saved) == "whole"
    random = "its head would be random, and has to be trained first: the checkpoint has no lm_head.weight"
    assert what_it_becomes(SumAggForCausalLM, model.config, saved) == random
    untrained = "all its weights are there, but its head was not trained for this: the checkpoint is a Classifier"
    assert what_it_becomes(SumAggForTokenClassification, model.config, saved) == untrained
    # With tied embeddings every weight of a language model is there.
    model.config.tie_word_embeddings = True
    assert what_it_becomes(SumAggForCausalLM, model.config, saved) == untrained


def test_a_folder_of_speech_is_heard_in_pieces_and_fits_its_processor(tmp_path, checks_in_this_process, capfd):
    processor = speech_processor(tmp_path)
    model, folder = build(SumAggForCTC, speech_config(vocab_size=len(processor.tokenizer))), tmp_path / "model"
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    save_model_card(model, folder, **without_model_id_and_type())
    printed = capfd.readouterr().out
    for text in (
        "AutoModelForCTC: SumAggForCTC",
        "stream: 1 + 9 tokens",
        "tokenizer: Wav2Vec2CTCTokenizer",
        "feature extractor: Speech2TextFeatureExtractor, 16000 samples a second",
        "card: automatic-speech-recognition",
    ):
        assert text in printed, printed
    (tmp_path / "other").mkdir()
    speech_processor(tmp_path / "other", num_mel_bins=7).save_pretrained(folder)
    with pytest.raises(ValueError, match="frames of 7 bins, and the model takes 5"):
        check_checkpoint(folder)
    model.config.pad_token_id = 3
    model.save_pretrained(folder)
    with pytest.raises(ValueError, match="padding token of the tokenizer, 0, must be the blank of the model, 3"):
        check_checkpoint(folder)


def adapter(base: Path, folder: Path, **kwargs) -> PeftModel:
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=3)
    model = get_peft_model(model, LoraConfig(init_lora_weights=False, **kwargs))
    model.save_pretrained(folder)
    return model


def test_an_adapter_gets_a_card_of_ours_and_is_loaded_on_its_base(tmp_path, checks_in_this_process, capfd):
    base, folder = tmp_path / "base", tmp_path / "adapter"
    build(SumAggForCausalLM, text_config(pooling="last")).save_pretrained(base)
    model = adapter(base, folder, task_type="SEQ_CLS")
    save_model_card(model, folder, **without_model_id_and_type(), model_id="user/adapter")
    card = ModelCard.load(folder / "README.md")
    assert (card.data.library_name, card.data.base_model, card.data.pipeline_tag) == (
        "peft",
        "base",
        "text-classification",
    )
    assert {"lora", "sumagg"} <= set(card.data.tags) and "custom_code" not in card.data.tags
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    for text in (
        "An adapter (LORA) of the model `base`",
        'base = AutoModelForSequenceClassification.from_pretrained(\n    "base"',
        "num_labels=3",
        'model = PeftModel.from_pretrained(base, "user/adapter")',
        f"of which the adapter trains {trained:,} |",
        "| **this model** | 12.35 | 0.5 |",
    ):
        assert text in card.text, text
    assert "[More Information Needed]" not in card.text
    printed = capfd.readouterr().out
    assert f"AutoModelForSequenceClassification: SumAggForSequenceClassification of {base}, LORA" in printed
    assert printed.count("forward: [1, 3], finite") == 2


@pytest.mark.slow
def test_an_adapter_that_lacks_what_is_new_in_its_model_fails_the_check(tmp_path):
    base, folder = tmp_path / "base", tmp_path / "adapter"
    build(SumAggForCausalLM, text_config(pooling="last")).save_pretrained(base)
    # Without a task PEFT does not save the new output layer.
    save_model_card(adapter(base, folder), folder, check=False, **without_model_id_and_type())
    with pytest.raises(
        SystemExit, match="error: .*Loaded twice, the adapter gives different outputs: .*modules_to_save"
    ):
        check(folder)


@pytest.mark.slow
def test_code_that_decodes_something_else_fails_the_check(tmp_path):
    build(SumAggForCausalLM, text_config()).save_pretrained(tmp_path)
    with code_file(tmp_path, "modeling_sumagg").open("a") as file:
        file.write(
            "import functools\n\nknowing = SumAggForCausalLM.forward\n\n\n@functools.wraps(knowing)\n"
            "def forward(self, input_ids=None, **kwargs):\n"
            "    if input_ids.shape[1] == 1:\n        input_ids = (input_ids + 1) % 61\n"
            "    return knowing(self, input_ids=input_ids, **kwargs)\n\n\n"
            "SumAggForCausalLM.forward = forward\n"
        )
    with pytest.raises(
        SystemExit, match="`generate` is wrong: .* does not fit transformers .*modeling_sumagg update FOLDER"
    ):
        check(tmp_path)


@pytest.mark.slow
def test_weights_that_do_not_fit_and_missing_code_fail_the_check(tmp_path):
    folder = tmp_path / "model"
    save_with_outputs(build(SumAggForCausalLM, text_config()), folder)
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weights"] = weights.pop("model.norm.weight")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(SystemExit, match="error: .*do not fit.*model.norm.weight"):
        check(folder)
    with pytest.raises(ValueError, match="do not fit"):
        save_model_card(build(SumAggForCausalLM, text_config()), folder, **without_model_id_and_type())
    code_file(folder, "recurrence").unlink()
    with pytest.raises(SystemExit, match="error: .*recurrence.py"):
        check(folder)
