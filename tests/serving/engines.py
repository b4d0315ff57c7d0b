"""Small models of every kind, an engine that runs one of them in this process, and what transformers says of the same."""

import gc
import os
import random

import torch
from testing import RELU_TERMS
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from modeling_sumagg import SumAggConfig, SumAggForCausalLM, ToSTForCausalLM, ToSTTextConfig


# Read by vLLM when it is imported.
ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "OMP_NUM_THREADS": "2",
}
VOCAB_SIZE = 500
SIZES = {"vocab_size": VOCAB_SIZE, "hidden_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4}
TABLE = {"position_embedding_type": "learned", "max_position_embeddings": 2304}
UNDECAYED = {**RELU_TERMS, "sum_decay": "none", "sum_gate": False, "rope_parameters": None}
PUBLISHED = {**TABLE, **UNDECAYED, "norm_position": "post", "sum_normalization": "none", "hidden_act": "relu"}


def sumagg(**options) -> SumAggForCausalLM:
    return SumAggForCausalLM(SumAggConfig(**{**SIZES, "tie_word_embeddings": False, **options}))


def tost(**options) -> ToSTForCausalLM:
    options = {**SIZES, "tie_word_embeddings": False, "layerscale_value": 0.5, **options}
    return ToSTForCausalLM(ToSTTextConfig(**options))


# As `linearize` makes them, of the parts of a Llama.
CONVERTED = {
    "layer_types": ["sliding_attention"] * 3,
    "sliding_window": 32,
    "attention_sinks": 4,
    "attention_sum": True,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "norm_type": "rms",
    "attention_bias": False,
    "mlp_bias": False,
    "num_sum_heads": 1,
    "position_bias": 1.0,
}
# All that the configs can say, in as few models as hold it.
KINDS = {
    "sums, as published": lambda: sumagg(**PUBLISHED, layer_types=["summation"] * 3, lm_head_bias=True),
    "hybrid": lambda: sumagg(**TABLE, **UNDECAYED, position_bias=0.0, tie_word_embeddings=True),
    "sliding": lambda: sumagg(
        **UNDECAYED,
        layer_types=["sliding_attention", "summation", "full_attention"],
        sliding_window=32,
        sum_normalization="mean",
        position_embedding_type="sinusoidal",
        position_bias=0.0,
    ),
    "attention": lambda: sumagg(**TABLE, **UNDECAYED, layer_types=["full_attention"] * 3, position_bias=0.0),
    "token statistics": lambda: tost(use_bias=True, max_position_embeddings=2304),
    "token statistics, hybrid": lambda: tost(
        layer_types=["token_statistics", "token_statistics", "full_attention"],
        use_membership_bias=False,
        position_embedding_type="sinusoidal",
    ),
    "defaults": lambda: sumagg(),
    "shared keys": lambda: sumagg(layer_types=["summation"] * 3, num_sum_key_heads=2, sum_state_size=16),
    "decays, gates and convolutions": lambda: sumagg(
        sum_state_size=None,
        layer_types=["summation", "summation", "sliding_attention"],
        sliding_window=32,
        num_sum_heads=8,
        rope_parameters={"rope_type": "linear", "rope_theta": 1000.0, "factor": 2.0},
    ),
    "decays learned, sums": lambda: sumagg(
        **{**RELU_TERMS, "conv_kernel_size": 2},
        layer_types=["summation"] * 3,
        sum_decay="learned",
        sum_normalization="none",
    ),
    "token statistics with decays": lambda: tost(
        sum_decay="input",
        layer_types=["token_statistics", "token_statistics", "sliding_attention"],
        sliding_window=32,
        use_membership_bias=False,
        position_embedding_type="none",
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    ),
    "converted": lambda: sumagg(**CONVERTED),
    "converted, a layer as it was": lambda: sumagg(
        **{
            **CONVERTED,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "attention_sum": False,
            "attention_norm": True,
            "attention_bias": "qkv",
            "num_key_value_heads": 1,
        },
    ),
}


def make_model(kind: str, seed: int = 0) -> PreTrainedModel:
    """A model of a kind with weights so large that its text is not one token over and over."""
    torch.manual_seed(seed)
    return randomized(KINDS[kind]())


@torch.no_grad()
def randomized(model: PreTrainedModel) -> PreTrainedModel:
    # Sums of terms that are all positive would otherwise drown the tokens.
    normalization, decays = getattr(model.config, "sum_normalization", "mean"), model.config.sum_decay != "none"
    output_std = {"mean": 0.1, "sqrt": 0.005, "none": 0.005 if decays else 0.0002}[normalization]
    for name, parameter in model.named_parameters():
        if "decay.logit" in name:
            continue
        elif "norm" in name or "layer_scale" in name or "temperature" in name or "decay.proj" in name:
            parameter.add_(0.1 * torch.randn_like(parameter))
        elif "embed" in name:
            parameter.normal_()
        elif "membership_bias" in name:
            parameter.normal_(std=0.1)
        elif "out_proj" in name:
            parameter.normal_(std=output_std)
        else:
            parameter.normal_(std=0.5 if ".conv." in name else 0.2)
    return model.eval()


def random_prompts(lengths, seed: int = 0) -> list[list[int]]:
    generator = random.Random(seed)
    return [[generator.randrange(VOCAB_SIZE) for _ in range(length)] for length in lengths]


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A token for each byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


@torch.no_grad()
def expected_text(model: PreTrainedModel, prompt: list[int], length: int) -> list[int]:
    """What `generate` of transformers writes after a prompt, alone."""
    ids = torch.tensor([prompt])
    text = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=length, do_sample=False, pad_token_id=0
    )
    return text[0, len(prompt) :].tolist()


class Engine:
    """vLLM with the model of a folder, in this process, until `close`."""

    def __init__(self, folder, **options):
        from vllm import LLM

        defaults = {
            "dtype": "float32",
            "enforce_eager": True,
            "max_model_len": 2304,
            "max_num_seqs": 32,
            "enable_prefix_caching": False,
            "skip_tokenizer_init": True,
            "disable_log_stats": False,
        }
        self.llm = LLM(str(folder), **{**defaults, **options})

    def sample(self, prompts: list[list[int]], length: int, **sampling):
        """The outputs of vLLM, one for each prompt."""
        from vllm import SamplingParams

        params = SamplingParams(max_tokens=length, ignore_eos=True, detokenize=False, **sampling)
        return self.llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], params, use_tqdm=False)

    def greedy(self, prompts: list[list[int]], length: int) -> list[list[int]]:
        return [list(output.outputs[0].token_ids) for output in self.sample(prompts, length, temperature=0)]

    def count(self, name: str) -> float:
        """A counter of vLLM's, such as "vllm:num_preemptions", over all engines of the process."""
        return sum(metric.value for metric in self.llm.get_metrics() if metric.name == name)

    def close(self) -> None:
        from vllm.distributed import cleanup_dist_env_and_memory

        del self.llm
        gc.collect()
        cleanup_dist_env_and_memory()


os.environ.update(ENVIRONMENT)
