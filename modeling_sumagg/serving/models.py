"""The models as vLLM takes them."""

import re
from collections.abc import Iterable

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from vllm.config import VllmConfig
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.mamba.mamba_utils import get_temporal_copy_spec
from vllm.model_executor.layers.pooler import DispatchPooler
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.model_executor.models.interfaces import (
    HasInnerState,
    IsHybrid,
    SupportsLoRA,
    SupportsMambaPrefixCaching,
    SupportsQuant,
)
from vllm.model_executor.models.interfaces_base import attn_type
from vllm.model_executor.models.utils import AutoWeightsLoader, WeightsMapper, maybe_prefix
from vllm.sequence import IntermediateTensors

from ..decoder.layout import SequenceLayout
from ..decoder.recurrence import recur
from ..models.families import FAMILIES
from ..ops.documents import find_documents
from ..ops.running_sum.running_sum import causal_sum
from .layers import keeps_state, put_in_engine_layers, put_windows_in, shard_on_meta
from .states import EngineCache, OperatorStates, RecurrentState, StateRecorder, StateSpec, page_size, pages


MAPPER = WeightsMapper(
    orig_to_new_stacked={
        ".q_proj.": (".qkv_proj.", "q"),
        ".k_proj.": (".qkv_proj.", "k"),
        ".v_proj.": (".qkv_proj.", "v"),
    },
)
StatesOfLayers = dict[int, OperatorStates]


class Served(nn.Module, HasInnerState, IsHybrid, SupportsMambaPrefixCaching, SupportsLoRA, SupportsQuant):
    """
    A bare model of ours with vLLM's layers in it, and the memory of its decode states.

    Raises:
        `ValueError`: the engine is asked for what it cannot do with these models.
    """

    packed_modules_mapping = {"qkv_proj": ["q_proj", "k_proj", "v_proj"]}
    embedding_modules = {"embed_tokens": "input_embeddings"}
    hf_to_vllm_mapper = MAPPER

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        super().__init__()
        self.config = config = vllm_config.model_config.hf_config
        check_engine(vllm_config)
        prefix = maybe_prefix(prefix, "model")
        with torch.device("meta"):
            self.model = bare_model_class(config)(config)
        layers = self.states_of(vllm_config)
        if layers and not vllm_config.model_config.is_hybrid:
            prepare_for_states(vllm_config)
        size = max((page_size(operators) for operators in layers.values()), default=0)
        self.states = {
            i: RecurrentState(operators, f"{prefix}.layers.{i}.state", size) for i, operators in layers.items()
        }
        put_in_engine_layers(self.model, config, vllm_config.cache_config, vllm_config.quant_config, prefix)

    @classmethod
    def states_of(cls, vllm_config: VllmConfig) -> StatesOfLayers:
        """The decode states of a request in one process, by the index of the layer and the name of the operator."""
        model_config = vllm_config.model_config
        return states_of(model_config.hf_config, model_config.dtype, vllm_config.parallel_config.tensor_parallel_size)

    @classmethod
    def largest_page(cls, vllm_config: VllmConfig) -> list[StateSpec]:
        return pages(max(cls.states_of(vllm_config).values(), key=page_size, default={}))[0]

    @classmethod
    def get_mamba_state_shape_from_config(cls, vllm_config: VllmConfig) -> tuple[tuple[int, ...], ...]:
        return tuple(shape for shape, _ in cls.largest_page(vllm_config))

    @classmethod
    def get_mamba_state_dtype_from_config(cls, vllm_config: VllmConfig) -> tuple[torch.dtype, ...]:
        return tuple(dtype for _, dtype in cls.largest_page(vllm_config))

    def get_mamba_state_copy_funcs(self, mamba_types):
        """For prefix caching: every tensor of a state is copied whole."""
        most = max(len(state.specs) for state in self.states.values())
        return dict.fromkeys(mamba_types, (get_temporal_copy_spec,) * most)

    def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.model.embed_tokens(input_ids)

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: torch.Tensor | None = None,
        **kwargs,
    ) -> torch.Tensor:
        """The hidden states `[n, d]` of the tokens `input_ids` `[n]` (or embeddings `[n, d]`) at `positions` `[n]`."""
        layout, cache = self.step(positions)
        hidden_states = self.embed_input_ids(input_ids) if inputs_embeds is None else inputs_embeds
        hidden_states = hidden_states.view(*layout.position_ids.shape, -1)
        model = self.model
        hidden_states = model.add_positions(hidden_states, layout.position_ids)
        shared = model.shared_arguments(layout)
        for layer in model.layers:
            hidden_states = layer(hidden_states, layout, cache=cache, **shared)
        return self.pooled(model.norm(hidden_states), layout, cache).flatten(0, 1)

    def pooled(self, hidden_states: torch.Tensor, layout: SequenceLayout, cache: EngineCache | None) -> torch.Tensor:
        """What is handed to the head, `[rows, T, d]`."""
        return hidden_states

    def step(self, positions: torch.Tensor) -> tuple[SequenceLayout, EngineCache | None]:
        """The layout of the tokens at `positions` `[n]`, and the cache of their states."""
        metadata = get_forward_context().attn_metadata
        if metadata is None or not self.states or not self.config.is_causal:
            # A trial run, attention alone, or whole prompts in one step: their positions tell them apart.
            documents = find_documents((positions == 0).long().cumsum(dim=0)[None])
            return SequenceLayout(positions[None], None, documents, None, {}), None
        step = metadata[next(iter(self.states.values())).prefix]
        return step.layout(positions), EngineCache(self.states, metadata)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        return AutoWeightsLoader(self).load_weights(weights, mapper=self.hf_to_vllm_mapper)


class CausalLM(Served):
    """A language model."""

    embedding_modules = {"embed_tokens": "input_embeddings", "lm_head": "output_embeddings"}

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        config = self.config
        self.lm_head = ParallelLMHead(
            config.vocab_size,
            config.hidden_size,
            bias=config.lm_head_bias,
            quant_config=vllm_config.quant_config,
            prefix=maybe_prefix(prefix, "lm_head"),
        )
        if config.tie_word_embeddings:
            self.lm_head = self.lm_head.tie_weights(self.model.embed_tokens)
        self.logits_processor = LogitsProcessor(config.vocab_size)

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        return self.logits_processor(self.lm_head, hidden_states, self.lm_head.bias)


@attn_type("hybrid")
class Embedding(Served):
    """A bare model: the hidden states of its tokens, or that of the last one."""

    is_pooling_model = True
    # A bare checkpoint has no prefix, one of a model with a head has, and its head is not read.
    hf_to_vllm_mapper = MAPPER | WeightsMapper(
        orig_to_new_regex={re.compile(r"^(lm_head|pooler|score)\..*"): None, re.compile(r"^(?!model\.)"): "model."}
    )

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        self.pooler = DispatchPooler.for_embedding(vllm_config.model_config.pooler_config)


@attn_type("hybrid")
class SequenceClassification(Served):
    """
    A sequence classifier. A pooled sum or mean goes on from token to token as one more decode state, so that prompts may
    be cut into chunks: vLLM takes what stands at the last token.
    """

    is_pooling_model = True
    # `pooler` is the engine's.
    hf_to_vllm_mapper = MAPPER | WeightsMapper(orig_to_new_prefix={"pooler.": "sequence_pooler."})

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        config, model_config = self.config, vllm_config.model_config
        pooling = model_config.pooler_config.get_seq_pooling_type()
        if pooling != "LAST":
            raise ValueError(
                f"A classifier pools as `pooling` of its config says, {getattr(config, 'pooling', 'last')!r}, and vLLM "
                f"takes that from the last token: `seq_pooling_type` must be 'LAST', got {pooling!r}."
            )
        head_class = FAMILIES[config.model_type].models["AutoModelForSequenceClassification"]
        self.sequence_pooler = head_class.pooler_class(config)
        self.score = nn.Linear(config.hidden_size, config.num_labels, dtype=model_config.head_dtype)
        self.pooler = DispatchPooler.for_seq_cls(model_config.pooler_config, classifier=self.score)

    @classmethod
    def states_of(cls, vllm_config: VllmConfig) -> StatesOfLayers:
        states, config = super().states_of(vllm_config), vllm_config.model_config.hf_config
        if sums_at_the_end(config):
            _, state = causal_sum(torch.empty(1, 1, config.hidden_size, device="meta"))
            states[config.num_hidden_layers] = {"causal_sum": [(tuple(state.shape[1:]), state.dtype)]}
        return states

    def pooled(self, hidden_states: torch.Tensor, layout: SequenceLayout, cache: EngineCache | None) -> torch.Tensor:
        config = self.config
        if not sums_at_the_end(config):
            return hidden_states
        count = layout.position_ids.float() + 1
        scale = count.reciprocal() if config.pooling == "mean" else None
        terms = self.sequence_pooler.proj(hidden_states)
        return recur(causal_sum, terms, layout, cache, config.num_hidden_layers, per_token={"scale": scale}, relu=True)


def sums_at_the_end(config: PreTrainedConfig) -> bool:
    """Whether the classifier pools a sum over the tokens."""
    return getattr(config, "pooling", "last") != "last"


def bare_model_class(config: PreTrainedConfig) -> type[PreTrainedModel]:
    return FAMILIES[config.model_type].models["AutoModel"]


def states_of(config: PreTrainedConfig, dtype: torch.dtype, num_processes: int) -> StatesOfLayers:
    """The decode states of the layers of a model that have one, read from a pass of one token on the device "meta"."""
    with_state = [i for i, kind in enumerate(config.layer_types) if keeps_state(config, kind)]
    if not config.is_causal or not with_state:
        return {}
    with torch.device("meta"):
        model = bare_model_class(config)(config).to(dtype).eval()
        shard_on_meta(model, config, num_processes)
        put_windows_in(model)
        layout = SequenceLayout(torch.zeros(1, 1, dtype=torch.long), None, None, None, {})
        hidden_states = torch.empty(1, 1, config.hidden_size, dtype=dtype)
        shared = model.shared_arguments(layout)
        states = {}
        for i in with_state:
            recorder = StateRecorder()
            model.layers[i](hidden_states, layout, cache=recorder, **shared)
            states[i] = recorder.operators
    return states


def prepare_for_states(vllm_config: VllmConfig) -> None:
    """
    Prepare the cache for the pooled sum of a classifier whose layers have no states, which vLLM does not expect to have
    any, and so sets nothing up for.
    """
    cache_config = vllm_config.cache_config
    if cache_config.enable_prefix_caching:
        raise ValueError(
            "This classifier's only decode state is its pooled sum, which prefix caching would leave out: start without it "
            "(`--no-enable-prefix-caching`, the default of classifiers)."
        )
    cache_config.mamba_block_size = vllm_config.model_config.max_model_len


def check_engine(vllm_config: VllmConfig) -> None:
    """Refuse at the start what would be wrong later."""
    config = vllm_config.model_config.hf_config
    has_state = any(keeps_state(config, kind) for kind in config.layer_types)
    if vllm_config.num_speculative_tokens and has_state:
        raise ValueError(
            "Speculative decoding needs decode states that go back over rejected tokens, which vLLM's memory of them does "
            "not: leave out `speculative_config`. (`generate` of transformers does assisted decoding with these models.)"
        )
    if not config.is_causal and "sliding_attention" in config.layer_types:
        raise ValueError(
            "A window of attention to both sides (`is_causal=False` with 'sliding_attention' layers) is another one in "
            "vLLM: use full attention in bidirectional models, or transformers to run this one."
        )
    key_heads = getattr(config, "num_key_value_heads", config.num_attention_heads)
    num_processes = vllm_config.parallel_config.tensor_parallel_size
    if (
        keeps_state(config, "sliding_attention")
        and "sliding_attention" in config.layer_types
        and key_heads % num_processes
    ):
        raise ValueError(
            f"Each process keeps the windows of its own heads of keys: `tensor_parallel_size` must divide "
            f"`num_key_value_heads` = {key_heads}, got {num_processes}."
        )
