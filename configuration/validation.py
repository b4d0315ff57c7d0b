"""The checks that the configs of both text families share."""

from collections.abc import Sequence

from transformers import PreTrainedConfig, configuration_utils


def register_layer_types(*layer_types: str) -> None:
    """Let transformers know these types: `Trainer` reads the config of a checkpoint as a plain `PreTrainedConfig`."""
    known = configuration_utils.ALLOWED_ATTN_LAYER_TYPES
    configuration_utils.ALLOWED_ATTN_LAYER_TYPES = (*known, *(kind for kind in layer_types if kind not in known))


def check_layer_types(layer_types: Sequence[str] | None, allowed: Sequence[str], num_hidden_layers: int) -> None:
    """Raise a `ValueError` unless there is one known layer type for each layer."""
    if layer_types is None:
        raise ValueError(
            "`layer_types` is None. It is derived when a config is made: change `num_hidden_layers` or `layer_types` in "
            "the arguments of the config class, or set both."
        )
    unknown = sorted(set(layer_types) - set(allowed))
    if unknown:
        raise ValueError(f"`layer_types` may hold {list(allowed)}, got {unknown}.")
    if len(layer_types) != num_hidden_layers:
        raise ValueError(
            f"`layer_types` must have `num_hidden_layers` = {num_hidden_layers} entries, got {len(layer_types)}: "
            f"{list(layer_types)}."
        )


def check_text_sizes(config: PreTrainedConfig) -> None:
    """Raise a `ValueError` unless sizes are positive, heads divide the width, and probabilities are probabilities."""
    for name in ("vocab_size", "hidden_size", "num_attention_heads", "intermediate_size", "max_position_embeddings"):
        if getattr(config, name) < 1:
            raise ValueError(f"`{name}` must be at least 1, got {getattr(config, name)}.")
    if config.num_hidden_layers < 0:
        raise ValueError(f"`num_hidden_layers` must be at least 0, got {config.num_hidden_layers}.")
    if config.hidden_size % config.num_attention_heads:
        raise ValueError(
            f"`num_attention_heads` must divide `hidden_size`, got {config.num_attention_heads} heads for a width of "
            f"{config.hidden_size}."
        )
    if config.sliding_window is not None and config.sliding_window < 1:
        raise ValueError(f"`sliding_window` must be at least 1, got {config.sliding_window}.")
    if config.position_embedding_type == "sinusoidal" and config.hidden_size % 2:
        raise ValueError(f"Sinusoidal positions need an even `hidden_size`, got {config.hidden_size}.")
    for name in ("embedding_dropout", "hidden_dropout", "attention_dropout", "classifier_dropout"):
        if not 0 <= getattr(config, name) < 1:
            raise ValueError(f"`{name}` must be in [0, 1), got {getattr(config, name)}.")
