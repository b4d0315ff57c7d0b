"""
Read a pretrained transformer of transformers' own into a [`SumAggForCausalLM`] with the same outputs, in which every layer
attends. It stands beside the conversion of original checkpoints, and never travels with a checkpoint.
"""

import re
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from ..configuration import SumAggConfig
from ..models.families import FAMILIES


MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")
RENAMING = (
    (r"\.self_attn\.o_proj\.", ".mixer.out_proj."),
    (r"\.self_attn\.", ".mixer."),
    (r"\.input_layernorm\.", ".mixer_norm."),
    (r"\.post_attention_layernorm\.", ".mlp_norm."),
)


def converted_config(config: PreTrainedConfig) -> SumAggConfig:
    """
    The config of a model with the outputs of a pretrained one, without a limit of length.

    Args:
        config (`PreTrainedConfig`): that of a Llama, Mistral, Qwen2 or Qwen3.

    Raises:
        `ValueError`: a model of another type, or with a part that our blocks do not have; the message names it.
    """
    if config.model_type not in MODEL_TYPES:
        raise ValueError(
            f"A model of type {config.model_type!r} cannot be converted: {_missing_part(config)}. Those of the types "
            f"{', '.join(MODEL_TYPES)} can."
        )
    rope = {name: value for name, value in (config.rope_parameters or {}).items() if value is not None}
    if rope.get("partial_rotary_factor") == 1:
        del rope["partial_rotary_factor"]
    if rope.get("rope_type") == "yarn" and "factor" not in rope:
        rope["factor"] = config.max_position_embeddings / rope["original_max_position_embeddings"]
    layer_types = getattr(config, "layer_types", None)
    if layer_types is None:
        # Every layer of a Mistral has the window, if it has one.
        window = config.sliding_window if config.model_type == "mistral" else None
        layer_types = ["full_attention" if window is None else "sliding_attention"] * config.num_hidden_layers
    return SumAggConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.num_key_value_heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        attention_norm=config.model_type == "qwen3",
        attention_bias="qkv" if config.model_type == "qwen2" else getattr(config, "attention_bias", False),
        attention_dropout=config.attention_dropout,
        intermediate_size=config.intermediate_size,
        hidden_act=config.hidden_act,
        mlp_bias=getattr(config, "mlp_bias", False),
        norm_type="rms",
        layer_norm_eps=config.rms_norm_eps,
        rope_parameters=rope,
        layer_types=list(layer_types),
        sliding_window=config.sliding_window if "sliding_attention" in layer_types else None,
        position_bias=1.0,
        # No layer sums, and the heads of the attention need not divide the width.
        num_sum_heads=1,
        initializer_range=config.initializer_range,
        tie_word_embeddings=config.tie_word_embeddings,
        bos_token_id=config.bos_token_id,
        eos_token_id=config.eos_token_id,
        pad_token_id=config.pad_token_id,
    )


def _missing_part(config: PreTrainedConfig) -> str:
    """What a model of another type has and our blocks have not, in words."""
    experts = [
        name for name in ("num_local_experts", "num_experts", "n_routed_experts") if getattr(config, name, None)
    ]
    if experts:
        return f"our feed-forward layers have no experts (`{experts[0]}` = {getattr(config, experts[0])})"
    if getattr(config, "alibi", False) or config.model_type in ("bloom", "mpt"):
        return "our attention layers have no ALiBi"
    if getattr(config, "rope_parameters", None) is None:
        return "it has no rotary positions (`rope_parameters`), which the attention layers need"
    return "its blocks are not known to be those of a Llama"


def convert_pretrained(teacher: PreTrainedModel) -> PreTrainedModel:
    """
    The same language model as a [`SumAggForCausalLM`], whose weights are those of `teacher` and not copies.

    Raises:
        `ValueError`: a model that our blocks cannot hold; the message names the part.
    """
    config = converted_config(teacher.config)
    model_class = FAMILIES[config.model_type].models["AutoModelForCausalLM"]
    weights = {}
    for name, tensor in teacher.state_dict().items():
        for pattern, replacement in RENAMING:
            name = re.sub(pattern, replacement, name)
        weights[name] = tensor
    with torch.device("meta"):
        model = model_class(config)
    model.load_state_dict(weights, assign=True)
    model.tie_weights()
    if teacher.generation_config is not None:
        model.generation_config = teacher.generation_config
    model.config._attn_implementation = teacher.config._attn_implementation
    return model.train(teacher.training)


def load_teacher(name_or_path: str, **kwargs: Any) -> PreTrainedModel:
    """
    A pretrained language model that [`convert_pretrained`] takes.

    Args:
        name_or_path (`str`): a Hub id, a folder that `save_pretrained` wrote, or a folder with one GGUF file (which needs
            the package `gguf`).
        kwargs: for `AutoModelForCausalLM.from_pretrained`.

    Raises:
        `ValueError`: a model that our blocks cannot hold, before its weights are read, or several GGUF files.
        `OSError`: there is no such model.
    """
    options = gguf_options(name_or_path)
    check_teacher(name_or_path)
    return AutoModelForCausalLM.from_pretrained(name_or_path, **options, **kwargs)


def check_teacher(name_or_path: str) -> None:
    """Raise as [`load_teacher`] does, without reading weights."""
    converted_config(AutoConfig.from_pretrained(name_or_path, **gguf_options(name_or_path)))


def gguf_options(name_or_path: str) -> dict[str, str]:
    """What `from_pretrained` must be told of a folder that has no `config.json` but a GGUF file."""
    folder = Path(name_or_path)
    if not folder.is_dir() or (folder / "config.json").exists():
        return {}
    names = sorted(path.name for path in folder.glob("*.gguf"))
    if len(names) > 1:
        raise ValueError(f"{folder} holds {len(names)} GGUF files, {', '.join(names[:5])}: give a folder with one.")
    return {"gguf_file": names[0]} if names else {}
