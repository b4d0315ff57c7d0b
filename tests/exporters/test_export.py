"""`python -m modeling_sumagg export`: graphs that write what `generate` writes, without this package."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from testing import WORDS, build, tiny_config, word_tokenizer
from transformers import LogitsProcessorList
from transformers.generation import (
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from modeling_sumagg import (
    SumAggForCausalLM,
    SumAggForCTC,
    SumAggForMaskedLM,
    SumAggForMultimodalRegression,
    SumAggForSequenceClassification,
    ToSTForCausalLM,
    ToSTForImageClassification,
)
from modeling_sumagg.__main__ import main
from modeling_sumagg.publishing.export import export_folder
from modeling_sumagg.publishing.onnx_text import TextModel


def saved(folder, model_class=SumAggForCausalLM, layers="pure", **settings):
    """A folder with a tiny model that is trained no more."""
    model = build(model_class, tiny_config(model_class, layers))
    for name, value in settings.items():
        setattr(model.generation_config, name, value)
    model.save_pretrained(folder)
    if model.config.model_type not in ("tost", "sumagg_speech"):
        word_tokenizer().save_pretrained(folder)
    return model


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model_class", "layers"),
    [
        (SumAggForCausalLM, "hybrid"),
        (SumAggForCausalLM, "sliding"),
        (SumAggForCausalLM, "converted"),
        (ToSTForCausalLM, "pure"),
    ],
)
def test_a_language_model_writes_without_this_package(model_class, layers, tmp_path, capsys):
    model = saved(tmp_path / "model", model_class, layers)
    main(["export", str(tmp_path / "model"), "--max_length", "48"])
    assert "tokens of `generate` are those of the graphs" in capsys.readouterr().out
    folder = tmp_path / "model-onnx"
    prompt = [5, 17, 40, 9]
    expected = model.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False, eos_token_id=None)[
        0
    ].tolist()
    # A process that cannot import torch or transformers.
    code = "import runpy, sys; sys.modules.update(torch=None, transformers=None); sys.argv = sys.argv[1:]; "
    code += "runpy.run_path(sys.argv[0], run_name='__main__')"
    words = " ".join(WORDS[i] for i in prompt)
    command = [sys.executable, "-c", code, str(folder / "run.py"), words, "--max_new_tokens", "12"]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert printed.split() == [WORDS[i] for i in expected if not WORDS[i].startswith("<")]

    writer = TextModel(folder)
    logits, state = writer.read(expected[:9], writer.empty_state())
    with torch.no_grad():
        assert torch.allclose(torch.from_numpy(logits), model(torch.tensor([expected[:9]])).logits[0, -1], atol=1e-4)
    # A state is kept, and continued twice.
    for end in (12, 16):
        again, _ = writer.read(expected[9:end], state)
        with torch.no_grad():
            wanted = model(torch.tensor([expected[:end]])).logits[0, -1]
        assert torch.allclose(torch.from_numpy(again), wanted, atol=1e-4)
    limit = 48 if layers == "hybrid" else getattr(model.config, "max_position_embeddings", None)
    assert writer.manifest["max_length"] == limit
    if limit is not None:
        with pytest.raises(ValueError, match=rf"reads {limit} tokens at most, got {limit + 1}"):
            writer.read([3] * (limit + 1), writer.empty_state())


@pytest.mark.slow
def test_weights_of_8_bits(tmp_path):
    model = saved(tmp_path / "model")
    export_folder(tmp_path / "model", tmp_path / "exact")
    report = export_folder(tmp_path / "model", tmp_path / "int8", int8=True)
    logits = []
    for name in ("exact", "int8"):
        writer = TextModel(tmp_path / name)
        logits.append(writer.read([5, 17, 40], writer.empty_state())[0])
    error = np.abs(logits[1] - logits[0]).max() / np.abs(logits[0]).max()
    assert 0 < error < 0.2
    assert "In int8," in report[-1]
    assert model.config.vocab_size == len(logits[0])


@pytest.mark.slow
@pytest.mark.parametrize(
    "model_class",
    [
        SumAggForSequenceClassification,
        SumAggForMaskedLM,
        SumAggForCTC,
        SumAggForMultimodalRegression,
        ToSTForImageClassification,
    ],
)
def test_other_models_become_one_graph(model_class, tmp_path):
    saved(tmp_path / "model", model_class, "hybrid")
    report = export_folder(tmp_path / "model", tmp_path / "onnx")
    # Measured on batches and lengths that the graph was not made with.
    assert float(report[-1].partition("off by ")[2].split()[0]) < 1e-4
    assert {"model.onnx", "weights.bin", "config.json"} <= {path.name for path in (tmp_path / "onnx").iterdir()}


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 0.7, "top_k": 0, "top_p": 0.6},
        {"temperature": 1.3, "top_k": 5, "top_p": 1.0},
        {"temperature": 1.0, "top_k": 50, "top_p": 0.9, "repetition_penalty": 1.7},
    ],
)
def test_the_probabilities_of_a_sample_are_those_of_generate(settings):
    writer = object.__new__(TextModel)
    settings = {"do_sample": True, "repetition_penalty": 1.0, **settings}
    writer.manifest = {"generation": settings}
    logits, text = 3 * torch.randn(1, 40), torch.tensor([[3, 9, 9, 21]])
    processors = [RepetitionPenaltyLogitsProcessor(settings["repetition_penalty"])]
    processors.append(TemperatureLogitsWarper(settings["temperature"]))
    processors += [TopKLogitsWarper(settings["top_k"])] if settings["top_k"] else []
    processors.append(TopPLogitsWarper(settings["top_p"]))
    expected = LogitsProcessorList(processors)(text, logits.clone()).softmax(-1)[0]
    actual = writer.probabilities(logits[0].numpy(), text[0].tolist())
    np.testing.assert_allclose(actual, expected.numpy(), atol=1e-6)


def test_errors_come_before_any_work(tmp_path):
    folder, target = tmp_path / "model", tmp_path / "target"
    with pytest.raises(ValueError, match="holds no config.json"):
        export_folder(tmp_path / "nothing", target)
    saved(folder, num_beams=3)
    with pytest.raises(ValueError, match=r"also has \['num_beams'\]: remove them there"):
        export_folder(folder, target)
    saved(folder)
    with pytest.raises(ValueError, match="`to` must be one of"):
        export_folder(folder, target, to="paper")
    with pytest.raises(ValueError, match="`max_length` must be at least 1, got 0"):
        export_folder(folder, target, max_length=0)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match=r"holds no tokenizer.json"):
        export_folder(folder, target)
    assert not target.exists()
    target.mkdir()
    (target / "notes.txt").touch()
    with pytest.raises(SystemExit, match="error: .*target is not empty, it holds notes.txt"):
        main(["export", str(folder), "--output_dir", str(target)])
    shutil.rmtree(folder)
    saved(folder, SumAggForSequenceClassification)
    with pytest.raises(ValueError, match="for causal language models"):
        export_folder(folder, tmp_path / "web", to="web")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "architectures": ["GPT2LMHeadModel"]}))
    with pytest.raises(ValueError, match="got 'GPT2LMHeadModel'"):
        export_folder(folder, tmp_path / "web")
