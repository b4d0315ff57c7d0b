"""The model families: one record each, which everything reads that has to know them all."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.image_processing_utils import BaseImageProcessor

from ..configuration import SumAggConfig, SumAggMultimodalConfig, SumAggSpeechConfig, ToSTConfig, ToSTTextConfig
from .modeling_sumagg import (
    SumAggForCausalLM,
    SumAggForMaskedLM,
    SumAggForSequenceClassification,
    SumAggForTokenClassification,
    SumAggModel,
)
from .modeling_sumagg_multimodal import SumAggForMultimodalRegression
from .modeling_sumagg_speech import SumAggForAudioClassification, SumAggForCTC, SumAggSpeechModel
from .modeling_tost import ToSTBackbone, ToSTForImageClassification, ToSTModel, tost_image_processor
from .modeling_tost_text import (
    ToSTForCausalLM,
    ToSTTextForSequenceClassification,
    ToSTTextForTokenClassification,
    ToSTTextModel,
)


StateDict = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Paper:
    """Where an architecture was published.

    Attributes:
        tag: the Hub's tag for it.
        citation: its BibTeX entry.
    """

    tag: str
    citation: str


@dataclass(frozen=True)
class OriginalFormat:
    """What converting the checkpoints of an original implementation takes.

    Attributes:
        renaming: (pattern, replacement) pairs; all are applied, in order, to every original tensor name.
        infer: the model class and the arguments of its config, read from the original names and shapes. The number of
            attention heads is `None` where only the user can know it. Raises `KeyError` with the name of a tensor that
            is missing, `ValueError` for a model that cannot be converted.
    """

    renaming: tuple[tuple[str, str], ...]
    infer: Callable[[StateDict], tuple[type[PreTrainedModel], dict[str, Any]]]


@dataclass(frozen=True, eq=False)
class Family:
    """A config class and the models that are built from it.

    Attributes:
        config_class: the config; its `model_type` is the name of the family.
        models: the model of each Auto class, by the name of the latter.
        lora_target_modules: what LoRA adapts by default: the maps that mix tokens, as in PEFT's defaults for other
            models. A module is adapted if its name ends in one of these.
        not_decayed: last names of the parameters with more than one dimension that are no weights of a linear map.
        image_processor: makes the image processor for a config.
        paper: where the architecture was published.
        pipeline_tag: the Hub's task, where the Auto class does not tell it.
        original_format: how to read the checkpoints of the original implementation.
    """

    config_class: type[PreTrainedConfig]
    models: dict[str, type[PreTrainedModel]]
    lora_target_modules: tuple[str, ...] = ()
    not_decayed: tuple[str, ...] = ()
    image_processor: Callable[[PreTrainedConfig], BaseImageProcessor] | None = None
    paper: Paper | None = None
    pipeline_tag: str | None = None
    original_format: OriginalFormat | None = None


SUMMATION = Paper(
    tag="doi:10.36227/techrxiv.175790522.25734653",
    citation="""\
@techreport{ekin2025summation,
  title       = {Summation-Based Transformers: A Path Toward Linear Complexity Sequence Modeling},
  author      = {Ekin, P.},
  institution = {TechRxiv},
  year        = {2025},
  doi         = {10.36227/techrxiv.175790522.25734653}
}""",
)
TOKEN_STATISTICS = Paper(
    tag="arxiv:2412.17810",
    citation="""\
@inproceedings{wu2025token,
  title     = {Token Statistics Transformer: Linear-Time Attention via Variational Rate Reduction},
  author    = {Wu, Ziyang and Ding, Tianjiao and Lu, Yifu and Pai, Druv and Zhang, Jingyuan and Wang, Weida and Yu, Yaodong and
               Ma, Yi and Haeffele, Benjamin D.},
  booktitle = {International Conference on Learning Representations},
  year      = {2025},
  eprint    = {2412.17810}
}""",
)


def _num_blocks(state_dict: StateDict, prefix: str) -> int:
    """Number of blocks `prefix.0.`, `prefix.1.`, ... in the names."""
    return len({name.split(".")[prefix.count(".") + 1] for name in state_dict if name.startswith(f"{prefix}.")})


def _infer_tost(state_dict: StateDict) -> tuple[type[PreTrainedModel], dict[str, Any]]:
    num_labels, hidden_size = state_dict["head.weight"].shape
    num_stages = sum(re.fullmatch(r"patch_embed\.proj\.\d+\.0\.weight", name) is not None for name in state_dict)
    return ToSTForImageClassification, {
        "hidden_size": hidden_size,
        "num_hidden_layers": _num_blocks(state_dict, "blocks"),
        "num_attention_heads": state_dict["blocks.0.attn.temp"].shape[0],
        "num_class_attention_layers": _num_blocks(state_dict, "cls_attn_blocks"),
        "mlp_ratio": state_dict["blocks.0.mlp.fc1.weight"].shape[0] / hidden_size,
        "patch_size": 2**num_stages,
        "num_channels": state_dict["patch_embed.proj.0.0.weight"].shape[1],
        "qkv_bias": "blocks.0.attn.qkv.bias" in state_dict,
        "num_labels": num_labels,
    }


def _infer_sumagg(state_dict: StateDict) -> tuple[type[PreTrainedModel], dict[str, Any]]:
    vocab_size, hidden_size = state_dict["token_embedding.weight"].shape
    attends = [f"layers.{i}.q_proj.weight" in state_dict for i in range(_num_blocks(state_dict, "layers"))]
    if all(attends):
        raise ValueError(
            "No layer of the checkpoint sums. The original code adds positions in its attention-only baseline, where a "
            "SumAgg model multiplies by them: such a checkpoint cannot be converted."
        )
    return SumAggForCausalLM, {
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "num_hidden_layers": len(attends),
        "num_attention_heads": None if any(attends) else 1,
        "intermediate_size": state_dict["layers.0.ff.0.weight"].shape[0],
        "hidden_act": "relu",
        "layer_types": ["full_attention" if attention else "summation" for attention in attends],
        "position_bias": 2.0,
        "max_position_embeddings": state_dict["pos_embedding.weight"].shape[0],
        "norm_position": "post",
        "sum_normalization": "none",
        **SumAggConfig.values_of_0_1,
        "lm_head_bias": "output_projection.bias" in state_dict,
        "tie_word_embeddings": False,
    }


def _infer_tost_text(state_dict: StateDict) -> tuple[type[PreTrainedModel], dict[str, Any]]:
    embeddings = state_dict["transformer.wte.weight"]
    vocab_size, hidden_size = embeddings.shape
    return ToSTForCausalLM, {
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "num_hidden_layers": _num_blocks(state_dict, "transformer.h"),
        "num_attention_heads": state_dict["transformer.h.0.attn.temp"].shape[0],
        "intermediate_size": state_dict["transformer.h.0.mlp.c_fc.weight"].shape[0],
        "use_bias": "transformer.ln_f.bias" in state_dict,
        "use_membership_bias": "transformer.h.0.attn.denom_bias" in state_dict,
        "max_position_embeddings": state_dict["transformer.wpe.weight"].shape[0],
        "tie_word_embeddings": torch.equal(state_dict.get("lm_head.weight", embeddings), embeddings),
    }


FAMILIES: dict[str, Family] = {
    family.config_class.model_type: family
    for family in (
        Family(
            config_class=SumAggConfig,
            models={
                "AutoModel": SumAggModel,
                "AutoModelForCausalLM": SumAggForCausalLM,
                "AutoModelForMaskedLM": SumAggForMaskedLM,
                "AutoModelForSequenceClassification": SumAggForSequenceClassification,
                "AutoModelForTokenClassification": SumAggForTokenClassification,
            },
            lora_target_modules=("in_proj", "hidden_proj", "qkv_proj", "gate_proj", "q_proj", "v_proj", "sum_gate"),
            paper=SUMMATION,
            original_format=OriginalFormat(
                renaming=(
                    (r"^token_embedding\.", "embed_tokens."),
                    (r"^pos_embedding\.", "modulation.position_embeddings."),
                    (r"\.proj\.0\.", ".mixer.in_proj."),
                    (r"\.proj\.2\.", ".mixer.hidden_proj."),
                    (r"\.([qkv]|out)_proj\.", r".mixer.\1_proj."),
                    (r"\.ff\.0\.", ".mlp.up_proj."),
                    (r"\.ff\.2\.", ".mlp.down_proj."),
                    (r"\.norm1\.", ".mixer_norm."),
                    (r"\.norm2\.", ".mlp_norm."),
                    (r"^final_norm\.", "norm."),
                    (r"^(?!output_projection\.)", "model."),
                    (r"^output_projection\.", "lm_head."),
                ),
                infer=_infer_sumagg,
            ),
        ),
        Family(
            config_class=SumAggMultimodalConfig,
            models={
                "AutoModelForSequenceClassification": SumAggForMultimodalRegression,
            },
            lora_target_modules=("proj", "dense", "dense1", "dense2"),
            pipeline_tag="tabular-regression",
            paper=SUMMATION,
        ),
        Family(
            config_class=SumAggSpeechConfig,
            models={
                "AutoModel": SumAggSpeechModel,
                "AutoModelForCTC": SumAggForCTC,
                "AutoModelForAudioClassification": SumAggForAudioClassification,
            },
            lora_target_modules=("in_proj", "hidden_proj", "qkv_proj", "gate_proj", "q_proj", "v_proj"),
            paper=SUMMATION,
        ),
        Family(
            config_class=ToSTConfig,
            models={
                "AutoModel": ToSTModel,
                "AutoModelForImageClassification": ToSTForImageClassification,
                "AutoBackbone": ToSTBackbone,
            },
            lora_target_modules=("w_proj", "qkv"),
            not_decayed=("temperature", "cls_token"),
            image_processor=tost_image_processor,
            paper=TOKEN_STATISTICS,
            original_format=OriginalFormat(
                renaming=(
                    (r"^patch_embed\.proj\.(\d+)\.0\.", r"embeddings.patch_embeddings.projection.\1.convolution."),
                    (r"^patch_embed\.proj\.(\d+)\.1\.", r"embeddings.patch_embeddings.projection.\1.normalization."),
                    (r"^pos_embeder\.token_projection\.", "embeddings.position_embeddings.projection."),
                    (r"^blocks\.(\d+)\.attn\.qkv\.", r"blocks.\1.attn.w_proj."),
                    (r"^blocks\.", "encoder.layers."),
                    (r"^cls_attn_blocks\.", "class_attention_layers."),
                    (r"^norm\.", "layernorm."),
                    (r"\.attn\.(?:to_out\.0|proj)\.", ".attention.o_proj."),
                    (r"\.attn\.(w_proj|qkv)\.", r".attention.\1."),
                    (r"\.attn\.temp$", ".attention.temperature"),
                    (r"\.gamma([12])$", r".layer_scale\1.scale"),
                    (r"^(?!head\.)", "tost."),
                    (r"^head\.", "classifier."),
                ),
                infer=_infer_tost,
            ),
        ),
        Family(
            config_class=ToSTTextConfig,
            models={
                "AutoModel": ToSTTextModel,
                "AutoModelForCausalLM": ToSTForCausalLM,
                "AutoModelForSequenceClassification": ToSTTextForSequenceClassification,
                "AutoModelForTokenClassification": ToSTTextForTokenClassification,
            },
            lora_target_modules=("w_proj", "q_proj", "v_proj"),
            not_decayed=("temperature", "membership_bias"),
            paper=TOKEN_STATISTICS,
            original_format=OriginalFormat(
                renaming=(
                    (r"^transformer\.wte\.", "model.embed_tokens."),
                    (r"^transformer\.wpe\.", "model.position_embeddings."),
                    (r"^transformer\.ln_f\.", "model.norm."),
                    (r"^transformer\.h\.", "model.layers."),
                    (r"\.ln_([12])\.", r".norm\1."),
                    (r"\.attn\.c_attn\.", ".attention.w_proj."),
                    (r"\.attn\.c_proj\.", ".attention.o_proj."),
                    (r"\.attn\.temp$", ".attention.temperature"),
                    (r"\.attn\.denom_bias$", ".attention.membership_bias"),
                    (r"\.mlp\.c_fc\.", ".mlp.fc1."),
                    (r"\.mlp\.c_proj\.", ".mlp.fc2."),
                    (r"\.gamma([12])$", r".layer_scale\1"),
                ),
                infer=_infer_tost_text,
            ),
        ),
    )
}
