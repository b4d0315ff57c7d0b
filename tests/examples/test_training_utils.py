import re
from collections import Counter

import pytest
from datasets import Dataset, DatasetDict
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModel

from modeling_sumagg import SumAggConfig, ToSTConfig, ToSTTextConfig
from modeling_sumagg.training import decay_parameter_names


SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
CONFIGS = {
    "sumagg": SumAggConfig(vocab_size=20, **SIZES),
    "tost": ToSTConfig(**SIZES, image_size=32, patch_size=16),
    "tost_text": ToSTTextConfig(
        vocab_size=20, use_bias=True, layer_types=["token_statistics", "full_attention"], **SIZES
    ),
}


@pytest.mark.parametrize("family", CONFIGS)
def test_only_maps_convolutions_and_embeddings_decay(family):
    model = AutoModel.from_config(CONFIGS[family])
    expected = {
        f"{name}.weight"
        for name, module in model.named_modules()
        if type(module).__name__ in ("Linear", "Conv2d", "Embedding")
    }
    assert set(decay_parameter_names(model)) == expected
    others = {re.sub(r"\d+|\..*\.", "", name.rpartition(".")[2]) for name, _ in model.named_parameters()} - {"weight"}
    assert others >= {"sumagg": {"bias"}, "tost": {"temperature", "scale", "cls_token"}}.get(
        family, {"temperature", "membership_bias", "layer_scale"}
    )


def test_trainer_decays_these_parameters_and_no_others(tmp_path):
    from training_utils import WeightDecayTrainer
    from transformers import TrainingArguments

    model = AutoModel.from_config(CONFIGS["tost_text"])
    trainer = WeightDecayTrainer(model, TrainingArguments(str(tmp_path), weight_decay=0.1, report_to="none"))
    trainer.create_optimizer()
    decayed, rest = trainer.optimizer.param_groups
    assert (decayed["weight_decay"], rest["weight_decay"]) == (0.1, 0.0)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert {names[id(parameter)] for parameter in decayed["params"]} == set(decay_parameter_names(model))
    assert len(decayed["params"]) + len(rest["params"]) == len(names)


@given(text=st.text(), vocab_size=st.sampled_from([300, 400]))
@settings(deadline=None, max_examples=30)
def test_the_tokenizer_gives_every_text_back(text, vocab_size):
    from training_utils import train_tokenizer

    tokenizer = train_tokenizer(["def run(self):\n        return self.value\n" * 3], vocab_size)
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


@given(documents=st.lists(st.lists(st.integers(1, 9), max_size=12), max_size=8), block_size=st.integers(1, 7))
def test_blocks_are_the_joined_documents(documents, block_size):
    from training_utils import concatenated_blocks

    blocks = list(concatenated_blocks(documents, 0, block_size))
    joined = [token for document in documents for token in (*document, 0)]
    assert all(len(block) == block_size for block in blocks)
    assert [token for block in blocks for token in block] == joined[: len(joined) // block_size * block_size]


def test_the_standard_library_is_split_by_file_and_no_line_names_its_package():
    from embedded_data import standard_library_packages, standard_library_sources

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
    ("arguments", "message"),
    [
        ({"train_file": "a.xml"}, r"ends with one of .*'\.csv'.*got 'a\.xml'"),
        ({"train_file": "a.csv", "dataset_name": "b"}, "--dataset_name or --train_file, not both"),
        ({"validation_file": "a.csv"}, "--validation_file needs a --train_file"),
        ({"text_column_name": "body"}, r"no column 'body'. Its columns are \['text'\].*--text_column_name"),
        ({"held_out_share": 0.5}, "has 1 rows: too few"),
    ],
)
def test_unusable_data_is_refused(arguments, message):
    from training_utils import TextDataArguments, load_splits

    def embedded() -> DatasetDict:
        return DatasetDict(train=Dataset.from_dict({"text": ["one"]}))

    with pytest.raises(ValueError, match=message):
        parsed = TextDataArguments(**arguments)
        load_splits(parsed, embedded, {"text": parsed.text_column_name}, seed=0)
