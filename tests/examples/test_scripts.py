"""What the scripts share: how they start, their configs, their data and their pictures."""

import importlib
import re
import runpy
import shutil
import sys
from collections import Counter

import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value
from matplotlib.figure import Figure
from running import EXAMPLES
from transformers import BertConfig, GPT2Config, Mamba2Config

from modeling_sumagg import SumAggConfig, ToSTTextConfig
from modeling_sumagg.training import plots
from modeling_sumagg.training.embedded_data import standard_library_packages, standard_library_sources
from modeling_sumagg.training.scripts import (
    DataArguments,
    LabelledDataArguments,
    ModelArguments,
    encode_labels,
    load_config,
    load_splits,
    model_max_length,
    user_errors,
)


DEFAULTS = {"model_type": "sumagg", "hidden_size": 64, "num_attention_heads": 4, "pooling": "mean"}
# An option of its own, and one that comes after all of those, if there are any.
OPTIONS = {
    "quickstart.py": ("--context_length", None),
    "run_clm.py": ("--packing", "--output_dir"),
    "run_text_classification.py": ("--max_length", "--output_dir"),
    "run_image_classification.py": ("--image_column_name", "--output_dir"),
    "run_multimodal_regression.py": ("--numeric_column_names", "--output_dir"),
    "run_speech_recognition_ctc.py": ("--max_seconds", "--output_dir"),
    "classify_spoken_digits.py": ("--preset", "--output_dir"),
    "stream_generation.py": ("--report_every", None),
    "stream_transcription.py": ("--chunk_ms", None),
    "visualize_membership.py": ("--shorter_side", None),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_help_begins_with_what_a_script_does_and_its_own_options(name, tmp_path, monkeypatch, capsys):
    shutil.copy(EXAMPLES / name, tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    with pytest.raises(SystemExit, match="0"):
        runpy.run_path(name, run_name="__main__")
    printed = capsys.readouterr().out
    usage, does = printed.split("\n\n")[:2]
    assert usage.startswith(f"usage: {name}")
    docstring = (EXAMPLES / name).read_text(encoding="utf-8").split('"""')[1]
    assert does.split() == docstring.partition("\n\n")[0].split()
    own, other = OPTIONS[name]
    assert printed.index(f"  {own} ") < (len(printed) if other is None else printed.index(other))
    # The options of `TrainingArguments` are named, and not explained again.
    assert printed.count("\n") < 130
    # What is written of its options is so.
    texts = [path.read_text(encoding="utf-8") for path in (EXAMPLES / "README.md", *EXAMPLES.glob("*.py"))]
    commands = re.findall(rf"python {name}((?:\\\n|[^\n`])*)", "\n".join(texts))
    given = set(re.findall(r"(?<=\s)--\w+", " ".join(commands)))
    assert given <= set(re.findall(r"--\w+", printed)) and (given or name == "quickstart.py")


def test_the_gallery_shows_every_script_and_its_pictures_exist():
    text = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    assert {f"`{path.name}`" for path in EXAMPLES.glob("*.py")} <= set(re.findall(r"`\w+\.py`", text))
    pictures = re.findall(r"\]\((gallery/[\w.]+)\)", text)
    assert {EXAMPLES / picture for picture in pictures} == set((EXAMPLES / "gallery").glob("*"))
    assert all((EXAMPLES / picture).stat().st_size < 300_000 for picture in pictures)


@pytest.mark.parametrize("name", [*OPTIONS, "sft_trl.py"])
def test_scripts_import_installed_packages_only(name):
    source = (EXAMPLES / name).read_text(encoding="utf-8")
    files = {path.stem for path in EXAMPLES.glob("*.py")}
    assert not files.intersection(re.findall(r"^(?:from|import) (\w+)", source, re.MULTILINE))
    # Threads that spin while they wait make a small model 10 times slower on a busy machine. Read at the import of torch.
    assert 'os.environ.setdefault("OMP_WAIT_POLICY", "passive")\n' in source.partition("import torch\n")[0]


def test_errors_of_users_are_one_line():
    with pytest.raises(SystemExit, match=r"^error: two lines$"), user_errors():
        raise ValueError("two\n  lines")
    with pytest.raises(KeyError), user_errors():
        raise KeyError("a fault of the program")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"config_overrides": "{hidden_size: 64}"}, r"--config_overrides '{hidden_size: 64}' is not JSON"),
        ({"config_overrides": "[1]"}, r"must be a JSON object such as .* got \[1\]"),
        ({"config_overrides": '{"hiden_size": 64}'}, r"SumAggConfig has no field 'hiden_size'. Did you mean 'hidden_size'\?"),
        ({"config_overrides": '{"model_type": "gpt22"}'}, r"no model type 'gpt22'. Did you mean 'gpt2'\?"),
        ({"config_overrides": '{"model_type": "gpt2", "n_headd": 2}'}, r"GPT2Config has no field 'n_headd'. Did you mean 'n_head'"),
        ({"config_overrides": '{"hidden_size": "wide"}'}, r"hidden_size.*expected int, got str"),
        ({"config_overrides": '{"hidden_size": 66}'}, "`num_attention_heads` must divide `hidden_size`, got 4 heads"),
        ({"preset": "sumagg-hybrid-smal"}, "no preset 'sumagg-hybrid-smal'"),
        ({"model_name_or_path": "tost-base"}, "tost-base is a preset, an architecture without weights: give it as --preset"),
        ({"preset": "tost-base", "model_name_or_path": "runs/clm"}, "--model_name_or_path or --preset, not both"),
        ({"lora_rank": 8}, "--lora_rank adapts a trained model: name it with --model_name_or_path"),
        ({"lora_rank": -1}, "--lora_rank must be at least 0, got -1"),
        ({"dtype": "os.system"}, "--dtype must be a floating dtype of torch such as bfloat16, got 'os.system'"),
        ({"dtype": "int8"}, "--dtype must be a floating dtype of torch such as bfloat16, got 'int8'"),
        ({"config_overrides": "[" * 100_000}, r"--config_overrides '\[{200}' is not JSON"),
        ({"config_overrides": '{"model_type": ["gpt2"]}'}, r"There is no model type \['gpt2'\]"),
        ({"config_overrides": '{"num_labels": "x"}'}, r'--config_overrides .*"x".* make no model: TypeError'),
        ({"config_overrides": '{"id2label": [1]}'}, "make no model: AttributeError"),
    ],
)  # fmt: skip
def test_a_model_that_cannot_be_built_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        load_config(ModelArguments(**arguments), DEFAULTS)


def test_a_config_is_of_the_defaults_the_preset_or_the_checkpoint_with_overrides(tmp_path):
    config = load_config(ModelArguments(config_overrides='{"hidden_size": 32}'), DEFAULTS, num_labels=5)
    assert (type(config), config.hidden_size, config.pooling, config.num_labels) == (SumAggConfig, 32, "mean", 5)
    config.save_pretrained(tmp_path)
    again = load_config(ModelArguments(str(tmp_path), config_overrides='{"pooling": "last"}'), {"model_type": "gpt2"})
    assert (type(again), again.hidden_size, again.pooling, again.num_labels) == (SumAggConfig, 32, "last", 5)
    preset = load_config(ModelArguments(preset="sumagg-published-lm"), DEFAULTS)
    assert preset.norm_position == "post" and preset.hidden_size != 64
    # A baseline gets the sizes by its own names for them, and its own type.
    baseline = load_config(ModelArguments(config_overrides='{"model_type": "gpt2", "num_hidden_layers": 3}'), DEFAULTS)
    assert (type(baseline), baseline.model_type, baseline.n_embd, baseline.n_layer) == (GPT2Config, "gpt2", 64, 3)
    assert DEFAULTS["model_type"] == "sumagg"


@pytest.mark.parametrize(
    ("config", "length"),
    [
        (SumAggConfig(position_embedding_type="learned", max_position_embeddings=77), 77),
        (SumAggConfig(position_embedding_type="sinusoidal"), 10**30),
        (SumAggConfig(position_embedding_type="none"), 10**30),
        (ToSTTextConfig(position_embedding_type="none", max_position_embeddings=77), 77),
        (ToSTTextConfig(position_embedding_type="none", use_membership_bias=False), 10**30),
        (GPT2Config(n_positions=77), 77),
        (BertConfig(max_position_embeddings=77), 77),
        (Mamba2Config(), 10**30),
    ],
    ids=lambda value: "" if isinstance(value, int) else value.model_type,
)
def test_what_the_tokenizer_calls_its_longest_text(config, length):
    assert model_max_length(config) == pytest.approx(length)


def embedded() -> DatasetDict:
    return DatasetDict(train=Dataset.from_dict({"text": ["one"]}))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"train_file": "conftest.py"}, ValueError, r"ends with one of .*'\.csv'.*got 'conftest\.py'"),
        ({"train_file": "nowhere"}, OSError, "There is no file or folder 'nowhere'"),
        ({"train_file": "nowhere.csv"}, OSError, "nowhere.csv"),
        ({"train_file": "broken.json"}, ValueError, "broken.json, line 1: no JSON: Expecting property name"),
        ({"train_file": "a.csv", "dataset_name": "b"}, ValueError, "--dataset_name or --train_file, not both"),
        ({"validation_file": "a.csv"}, ValueError, "--validation_file needs a --train_file"),
        ({"test_file": "a.csv"}, ValueError, "--test_file needs a --train_file"),
        ({"train_file": "body.csv"}, ValueError, r"no column 'text'. Its columns are \['body'\]: choose .* _column_name"),
        ({"held_out_share": 0.5}, ValueError, "has 1 rows: too few"),
    ],
)  # fmt: skip
def test_unusable_data_is_refused(tmp_path, monkeypatch, arguments, error, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "conftest.py").touch()
    (tmp_path / "broken.json").write_text("{nothing")
    (tmp_path / "body.csv").write_text("body\none\n")
    with pytest.raises(error, match=message):
        load_splits(LabelledDataArguments(**arguments), embedded, {"text": "text"}, seed=0)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("ending", ["csv", "json", "jsonl", "parquet", "txt"])
def test_every_kind_of_file_is_read_streamed_or_not(tmp_path, ending, streaming):
    rows = Dataset.from_dict({"body": [f"line {row}\nof a text" for row in range(10)], "other": list(range(10))})
    path = tmp_path / f"rows.{ending}"
    if ending == "txt":
        path.write_text("\n".join(rows["body"]))
    else:
        getattr(rows, {"jsonl": "to_json"}.get(ending, f"to_{ending}"))(path)
    validation = {"validation_file": str(path)} if ending == "txt" else {}
    splits = load_splits(
        DataArguments(train_file=str(path), held_out_share=0.2, **validation),
        embedded,
        {"text": "text" if ending == "txt" else "body"},
        seed=0,
        streaming=streaming,
        held_out_rows=3,
    )
    found = {name: [row["text"] for row in split] for name, split in splits.items()}
    assert list(found) == ["train", "validation"]
    if ending == "txt":
        # A file is a document.
        assert found["train"] == found["validation"] == ["\n".join(rows["body"])]
    else:
        assert len(found["validation"]) == (3 if streaming else 2)
        assert sorted(found["train"] + found["validation"]) == rows["body"][:]


def test_classes_are_numbered_in_order():
    def encoded(labels: dict[str, list], feature=None):
        splits = {
            name: Dataset.from_dict({"text": ["a"] * len(values), "label": values}, features=feature)
            for name, values in labels.items()
        }
        splits, names = encode_labels(DatasetDict(splits))
        return names, {name: split["labels"][:] for name, split in splits.items()}

    assert encoded({"train": [10, 2, 10], "test": [3]}) == (["2", "3", "10"], {"train": [2, 0, 2], "test": [1]})
    assert encoded({"train": ["b", "a"]}) == (["a", "b"], {"train": [1, 0]})
    named = Features({"text": Value("string"), "label": ClassLabel(names=["z", "y", "x"])})
    assert encoded({"train": [1, 0]}, named) == (["z", "y", "x"], {"train": [1, 0]})
    with pytest.raises(ValueError, match="Row 2 of the test split has no label"):
        encoded({"train": [1, 0], "test": [1, -1]}, named)


def test_the_standard_library_is_split_by_file_and_no_line_names_its_package():
    sources = standard_library_sources()
    paths = Counter(path for split in sources.values() for path in split["path"])
    assert set(paths.values()) == {1} and len(paths) > 200
    assert len(sources["train"]) > 8 * len(sources["test"]) > 0 < len(sources["validation"])

    packages = standard_library_packages()
    names = packages["train"].features["label"].names
    assert len(names) >= 5
    assert not re.search("|".join(names), "\n".join([*packages["train"]["text"], *packages["test"]["text"]]).lower())
    for split in packages.values():
        assert set(split["label"]) == set(range(len(names)))
    train = set(packages["train"]["text"])
    assert not train.intersection(text for text in packages["test"]["text"] if len(text) > 500)


@pytest.mark.parametrize(
    ("module", "missing"),
    [
        ("embedded_data", "datasets"),
        ("embedded_data", "sklearn"),
        ("plots", "matplotlib"),
        ("data_files", "PIL"),
        ("model_arguments", "peft"),
        ("runs", "peft"),
        ("scripts", "datasets"),
    ],
)
def test_what_the_extra_installs_is_named_where_it_is_missing(monkeypatch, module, missing):
    for name in [name for name in sys.modules if name.split(".")[0] == missing]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, missing, None)
    monkeypatch.delitem(sys.modules, f"modeling_sumagg.training.{module}")
    with pytest.raises(ImportError, match=rf"need {missing}.*: run `pip install 'modeling-sumagg\[examples\]'`"):
        importlib.import_module(f"modeling_sumagg.training.{module}")


def test_the_picture_of_a_run(tmp_path, monkeypatch):
    figures: list[Figure] = []
    monkeypatch.setattr(plots, "Figure", lambda **options: figures.append(Figure(**options)) or figures[0])
    history = [
        {"step": step, "loss": 9 - step, "eval_loss": 8 - step / 2, "eval_perplexity": 100 / step}
        for step in range(1, 8)
    ]
    baselines = {"frequencies": 90.0, "chance": 89.0}
    plots.plot_training(
        history, tmp_path / "a.png", metric="perplexity", baselines=baselines, model_name="ours", logarithmic=True
    )
    left, right = figures[0].axes
    assert [axes.get_ylabel() for axes in (left, right)] == ["loss (nats)", "Perplexity (per token)"]
    for axes in (left, right):
        low, high = axes.get_xlim()
        ticks = [tick for tick in axes.get_xticks() if low <= tick <= high]
        assert len(ticks) >= 4 and all(tick == round(tick) for tick in ticks)
        low, high = axes.get_ylim()
        assert len([tick for tick in axes.get_yticks() if low <= tick <= high]) >= 4
    # The model has its colour in both panels, and every line its name in its own, none over another.
    lines = {line.get_label(): line for line in right.lines}
    colors = [line.get_color() for line in right.lines]
    assert colors == ["C0", "C1", "C2"] and {line.get_color() for line in left.lines} == {"C0"}
    assert [list(line.get_ydata()) for line in right.lines[1:]] == [[90.0, 90.0], [89.0, 89.0]] and len(lines) == 3
    names = {text.get_text(): text for text in right.texts}
    assert set(names) == {"ours 14.29", "frequencies 90", "chance 89"}
    assert [names[text].get_color() for text in ("ours 14.29", "frequencies 90", "chance 89")] == colors
    boxes = [text.get_window_extent() for text in right.texts]
    assert not any(a.overlaps(b) for index, a in enumerate(boxes) for b in boxes[:index])
