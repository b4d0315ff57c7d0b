"""Load every checkpoint of a folder, hold it to its recorded outputs, train it a step and save it to another folder."""

import io
import json
import logging
import sys
import tempfile
from pathlib import Path

import torch
import transformers
from peft import LoraConfig, get_peft_model
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoProcessor, AutoTokenizer, Trainer, TrainingArguments, pipeline
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from transformers.models.auto.image_processing_auto import AutoImageProcessor


def first_output(model, inputs):
    output = model.eval()(**inputs).to_tuple()[0]
    return output[-1] if isinstance(output, tuple) else output


def train(model, inputs):
    """One step, by the `Trainer` for a language model, as LoRA to be merged for a token classifier, else by SGD."""
    name = type(model).__name__
    if name.endswith("CausalLM"):
        rows = [{"input_ids": row, "labels": row} for row in inputs["input_ids"]]
        with tempfile.TemporaryDirectory() as folder:
            arguments = TrainingArguments(
                folder,
                max_steps=1,
                save_steps=1,
                learning_rate=0.1,
                label_smoothing_factor=0.1,
                report_to=[],
                use_cpu=True,
                disable_tqdm=True,
            )
            trainer = Trainer(model, arguments, train_dataset=rows)
            smoothed = trainer.compute_loss(model, {**inputs, "labels": inputs["input_ids"].clone()})
            logits, labels = model(**inputs).logits[:, :-1], inputs["input_ids"][:, 1:]
            expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), label_smoothing=0.1)
            torch.testing.assert_close(smoothed, expected, rtol=1e-5, atol=1e-6)
            trainer.train()
            written = {path.stem.split("_", 2)[2] for path in (Path(folder) / "checkpoint-1").glob("sumagg_*.py")}
            assert ("modeling_sumagg" in written) == name.startswith("SumAgg") and "registration" in written
        return model, trainer.save_model
    if name.endswith("TokenClassification"):
        # The default layers of the family.
        model = get_peft_model(model, LoraConfig(init_lora_weights=False))
        return model.merge_and_unload(), None
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    first_output(model, inputs).square().mean().backward()
    optimizer.step()
    return model, None


def run_pipeline(name, folder, config):
    """Run the task's pipeline, which logs an error where it does not know the class."""
    logged = io.StringIO()
    handler = logging.StreamHandler(logged)
    transformers.logging.get_logger("transformers").addHandler(handler)
    if name.endswith("CausalLM"):
        generate = pipeline("text-generation", folder, trust_remote_code=True)
        (result,) = generate("w1 w2 w3", max_new_tokens=4, do_sample=False, return_full_text=False)
        assert isinstance(result["generated_text"], str), result
    elif name.endswith("SequenceClassification"):
        results = pipeline("text-classification", folder, trust_remote_code=True)(["w1 w2", "w3"])
        assert {result["label"] for result in results} <= set(config.id2label.values()), results
    elif name.endswith("ImageClassification"):
        results = pipeline("image-classification", folder, trust_remote_code=True)(Image.new("RGB", (40, 30), "red"))
        assert abs(sum(result["score"] for result in results) - 1) < 1e-5, results
    elif name.endswith(("ForCTC", "AudioClassification")):
        task = "automatic-speech-recognition" if name.endswith("ForCTC") else "audio-classification"
        result = pipeline(task, folder, trust_remote_code=True)(torch.randn(8000).numpy())
        assert isinstance(result["text"] if name.endswith("ForCTC") else result[0]["label"], str), result
    transformers.logging.get_logger("transformers").removeHandler(handler)
    assert "is not supported" not in logged.getvalue(), logged.getvalue()[:200]


def load_as_another_head(folder):
    body = transformers.AutoModel.from_pretrained(folder, trust_remote_code=True)
    classifier = transformers.AutoModelForSequenceClassification.from_pretrained(
        folder, trust_remote_code=True, num_labels=5
    )
    assert classifier.config.num_labels == 5
    weights = body.state_dict()
    for name, weight in classifier.base_model.state_dict().items():
        torch.testing.assert_close(weight, weights[name], rtol=0, atol=0)


def main(source: Path, target: Path) -> None:
    assert "modeling_sumagg" not in sys.modules
    target.mkdir()
    for folder in sorted(path for path in source.iterdir() if path.is_dir()):
        with safe_open(folder.with_suffix(".safetensors"), "pt") as file:
            inputs = {key: file.get_tensor(key) for key in file.keys()}
            auto_class = file.metadata()["auto_class"]
        expected = inputs.pop("output")
        if auto_class == "AutoBackbone":
            # It takes no local folder.
            reference = json.loads((folder / "config.json").read_text())["auto_map"][auto_class]
            loader = get_class_from_dynamic_module(reference, folder)
        else:
            loader = getattr(transformers, auto_class)
        model, info = loader.from_pretrained(folder, trust_remote_code=True, output_loading_info=True)
        assert not any(info.values()), (folder, info)
        assert type(model).__name__ == folder.name, (folder, type(model))
        with torch.no_grad():
            # Convolutions and products round by how their memory happens to be aligned.
            torch.testing.assert_close(first_output(model, inputs), expected, rtol=1e-5, atol=1e-6, msg=str(folder))
        if model.can_generate():
            tokens = model.generate(**inputs, max_new_tokens=3, min_new_tokens=3, do_sample=False)
            assert tokens.shape[1] == inputs["input_ids"].shape[1] + 3
            load_as_another_head(folder)
        if getattr(model, "can_stream", False):
            outputs, pieces = {}, []
            for piece in inputs["input_features"].split(5, dim=1):
                outputs = model(piece, cache=outputs.get("cache"), use_cache=True)
                pieces.append(outputs[0])
            torch.testing.assert_close(torch.cat(pieces, dim=1), expected, rtol=1e-4, atol=1e-5)
        run_pipeline(folder.name, str(folder), model.config)

        model, save = train(model, inputs)
        again = target / folder.name
        (save or model.save_pretrained)(again)
        if "input_ids" in inputs:
            AutoTokenizer.from_pretrained(folder, trust_remote_code=True).save_pretrained(again)
        elif "input_features" in inputs:
            AutoProcessor.from_pretrained(folder).save_pretrained(again)
        else:
            AutoImageProcessor.from_pretrained(folder).save_pretrained(again)
        with torch.no_grad():
            trained = first_output(model, inputs)
        assert not torch.equal(trained, expected), folder
        save_file(
            inputs | {"output": trained.contiguous()},
            again.with_suffix(".safetensors"),
            metadata={"auto_class": auto_class},
        )
        print(folder.name, "ok", flush=True)


main(Path(sys.argv[1]), Path(sys.argv[2]))
