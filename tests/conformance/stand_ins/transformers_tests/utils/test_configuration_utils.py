"""Stands in for a table of `ConfigTester` that transformers' source distribution lacks."""

# Arguments of `PreTrainedConfig` that every config must accept and keep, each with a value that is not its default.
config_common_kwargs = {
    "return_dict": False,
    "output_hidden_states": True,
    "output_attentions": True,
    "dtype": "float16",
    "chunk_size_feed_forward": 5,
    "architectures": ["BertModel"],
    "id2label": {0: "label"},
    "label2id": {"label": 0},
    "problem_type": "regression",
}
