"""
Turn a pretrained transformer into a model whose decode state does not grow, by replacing its attention layers.

    python -m modeling_sumagg linearize --model_name_or_path HuggingFaceTB/SmolLM2-135M-Instruct --output_dir runs/linear
    python -m modeling_sumagg linearize --model_name_or_path folder --steps 0 --license apache-2.0 --output_dir runs/linear

A replaced layer attends to a window and to the first tokens of a document. Beside them it reads a sum with keys, which a
gate adds: it begins closed, so that the model begins as one with windows alone. Three stages train it, as RADLADS (arXiv
2505.03005) does: the replaced mixers alone, by the outputs of the teacher's; all weights by the teacher's logits; all
weights by the text, in longer sequences. A run that was stopped goes on where it was if the same command is given again.

It needs what the example scripts need: `pip install 'modeling-sumagg[examples]'`, and for a GGUF file `gguf`.
"""

import copy
import json
import math
import re
import shutil
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCard, model_info
from huggingface_hub.errors import HfHubHTTPError
from torch import nn
from torch.nn import functional as F
from transformers import (
    AutoTokenizer,
    PreTrainedModel,
    TrainerCallback,
    TrainingArguments,
    default_data_collator,
    set_seed,
)

from ..common.whole_files import write_whole
from ..decoder.masks import decoder_layout
from ..publishing.cards import decode_state_size, save_model_card
from ..publishing.files import printable, read_json
from ..publishing.pretrained import check_teacher, convert_pretrained, gguf_options, load_teacher
from .chunk_trainer import ChunkTrainer
from .embedded_data import standard_library_sources
from .model_arguments import model_max_length
from .plots import plot_training
from .runs import StopAtInterrupt
from .scripts import DataArguments, last_checkpoint, load_splits, parse_arguments, run, source_of, user_errors


STAGES = ("mixers", "logits", "text")
# The file that a finished stage leaves in its folder.
FINISHED = "finished.json"


@dataclass
class LinearizeArguments(DataArguments):
    """Options of the command, beside those of `TrainingArguments`, which hold for each of the stages."""

    model_name_or_path: str | None = field(
        default=None,
        metadata={"help": "The teacher: a Hub id, a folder that save_pretrained wrote, or a folder with a GGUF file."},
    )
    keep_attention: str = field(
        default="none",
        metadata={
            "help": "Layers that go on attending to all tokens: none; every_4 (or another number): each fourth; auto: the "
            "quarter whose replacement costs most, each measured alone."
        },
    )
    window: int = field(default=256, metadata={"help": "Tokens that a replaced layer attends to, its own included."})
    sinks: int = field(default=4, metadata={"help": "First tokens of a document that it always attends to."})
    with_sum: bool = field(default=True, metadata={"help": "Whether replaced layers have a sum beside the window."})
    untie_embeddings: bool = field(
        default=False,
        metadata={"help": "Whether the output layer of a teacher with tied embeddings becomes a matrix of its own."},
    )
    steps: list[int] = field(
        default_factory=lambda: [200, 400, 100],
        metadata={"help": "Steps of the three stages, or one number for each of them; 0: nothing is trained."},
    )
    learning_rates: list[float] | None = field(
        default=None,
        metadata={
            "help": "Learning rates of the three stages; by default --learning_rate in the first, in which a layer learns "
            "from its own loss, and a tenth of it in the others."
        },
    )
    text_column_name: str = field(default="text", metadata={"help": "Column with the texts."})
    block_size: int = field(default=512, metadata={"help": "Tokens of a sequence in the first two stages."})
    long_block_size: int = field(default=2048, metadata={"help": "Tokens of a sequence in the last stage."})
    chunk_length: int = field(default=512, metadata={"help": "The last stage reads a sequence in chunks of so many."})
    max_eval_samples: int | None = field(default=8, metadata={"help": "Held-out blocks that models are compared on."})
    license: str | None = field(
        default=None, metadata={"help": "The licence of the teacher; by default what its own card says."}
    )
    dtype: str = field(default="float32", metadata={"help": "dtype of the weights, such as bfloat16."})
    attn_implementation: str | None = field(default=None, metadata={"help": "eager, sdpa, flex_attention."})

    def __post_init__(self):
        super().__post_init__()
        if self.model_name_or_path is None:
            raise ValueError("Give the teacher as --model_name_or_path.")
        if len(self.steps) == 1:
            self.steps = self.steps * len(STAGES)
        if len(self.steps) != len(STAGES) or min(self.steps) < 0:
            raise ValueError(f"--steps takes one number from 0 or three, got {self.steps}.")
        if self.learning_rates is not None and (
            len(self.learning_rates) != len(STAGES) or min(self.learning_rates) <= 0
        ):
            raise ValueError(f"--learning_rates takes three numbers above 0, got {self.learning_rates}.")
        if not re.fullmatch(r"none|auto|every_[1-9]\d*", self.keep_attention):
            raise ValueError(f"--keep_attention must be none, auto or every_N, got {self.keep_attention!r}.")
        smallest = {"window": 1, "sinks": 0, "block_size": 2, "long_block_size": 2, "chunk_length": 1}
        for name, least in smallest.items():
            if getattr(self, name) < least:
                raise ValueError(f"--{name} must be at least {least}, got {getattr(self, name)}.")


def linearize(
    teacher: PreTrainedModel,
    kept: list[int],
    *,
    window: int = 256,
    sinks: int = 4,
    with_sum: bool = True,
    untie_embeddings: bool = False,
) -> PreTrainedModel:
    """
    A copy of a converted teacher whose attention layers, but for those `kept`, have windows, sinks and a closed sum.

    Args:
        teacher (`PreTrainedModel`): what `convert_pretrained` returned.
        kept (`list[int]`): the layers that go on as they are.
        window (`int`): tokens that a layer attends to, its own included.
        sinks (`int`): first tokens of a document that it always attends to.
        with_sum (`bool`): whether it has a sum with keys, with time constants from the window to 64 windows.
        untie_embeddings (`bool`): whether the output layer is a copy of the embeddings that learns on its own.

    Raises:
        `ValueError`: a layer of the teacher has a window of its own that is smaller or would stay beside the new one.
    """
    config = copy.deepcopy(teacher.config)
    if "sliding_attention" in config.layer_types:
        raise ValueError(
            f"The teacher has layers with a window of {config.sliding_window} tokens already, and only teachers whose layers "
            "all attend to all tokens can be linearized: set its `sliding_window` to null if its texts are shorter."
        )
    num_layers = config.num_hidden_layers
    config.layer_types = ["full_attention" if i in kept else "sliding_attention" for i in range(num_layers)]
    config.sliding_window, config.attention_sinks = window, sinks
    config.attention_sum = with_sum
    config.tie_word_embeddings = config.tie_word_embeddings and not untie_embeddings
    config.sum_decay_min, config.sum_decay_max = float(window), 64.0 * window
    # Made anew, so that what depends on these fields is derived.
    config = type(config).from_dict(config.to_dict())
    config._attn_implementation = teacher.config._attn_implementation
    student = type(teacher)(config).to(device=teacher.device, dtype=teacher.dtype)
    missing, unexpected = student.load_state_dict(teacher.state_dict(), strict=False)
    if unexpected or [name for name in missing if not re.search(r"\.mixer\.(decay|sum_gate)\.", name)]:
        raise RuntimeError(f"The copy of the teacher lacks {missing}, and has no place for {unexpected}.")
    student.tie_weights()
    student.generation_config = copy.deepcopy(teacher.generation_config)
    return student.train(teacher.training)


def layers_to_keep(
    keep_attention: str, teacher: PreTrainedModel, rows: list[dict[str, list[int]]], **options: Any
) -> list[int]:
    """The indices of the layers that `--keep_attention` names; `options` are those of [`linearize`]."""
    num_layers = teacher.config.num_hidden_layers
    if keep_attention == "none":
        return []
    if keep_attention != "auto":
        number = int(keep_attention.partition("_")[2])
        return list(range(number - 1, num_layers, number))
    losses = []
    for i in range(num_layers):
        others = [layer for layer in range(num_layers) if layer != i]
        losses.append(math.log(perplexity(linearize(teacher, others, **{**options, "with_sum": False}), rows)))
        print(f"layer {i}: {losses[-1]:.4f} nats a token with a window in it alone", flush=True)
    costliest = sorted(range(num_layers), key=lambda i: -losses[i])
    return sorted(costliest[: max(1, num_layers // 4)])


@torch.no_grad()
def perplexity(model: PreTrainedModel, rows: list[dict[str, list[int]]]) -> float:
    """The perplexity of the tokens of all rows but the first of each."""
    was_training = model.training
    model.eval()
    total, count = 0.0, 0
    for row in rows:
        input_ids = torch.tensor([row["input_ids"]], device=model.device)
        logits = model(input_ids, use_cache=False).logits
        total += F.cross_entropy(logits[0, :-1].float(), input_ids[0, 1:], reduction="sum").item()
        count += input_ids.shape[1] - 1
    model.train(was_training)
    return math.exp(total / count)


class HeldOutPerplexity(TrainerCallback):
    """Measures the model on held-out blocks at each checkpoint, and at the end."""

    def __init__(self, held_out: list[dict[str, list[int]]]):
        self.held_out = held_out

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step % state.save_steps == 0 or state.global_step == state.max_steps:
            value = perplexity(model, self.held_out)
            # Here, so that the checkpoint holds it.
            state.log_history.append({"step": state.global_step, "eval_perplexity": value})
            print(f"Step {state.global_step}: perplexity {value:.2f} on the held-out blocks.", flush=True)


class StageTrainer(ChunkTrainer):
    """
    [`~transformers.Trainer`] of one stage.

    Args:
        args, kwargs: those of [`ChunkTrainer`].
        stage (`str`): one of `STAGES`. In that of the mixers the loss is the mean over the replaced layers of the squared
            distance to the output of the teacher's mixer, as a share of the output's square. In that of the logits it is
            the KL divergence from the teacher's prediction, in nats a token.
        teacher (`PreTrainedModel`): the converted teacher, whose layers all attend.
    """

    def __init__(self, *args, stage: str, teacher: PreTrainedModel, **kwargs):
        super().__init__(*args, **kwargs)
        self.stage, self.teacher = stage, teacher.eval().requires_grad_(False).to(self.args.device)
        if stage != "text":
            # The losses of these stages are means over a batch.
            self.model_accepts_loss_kwargs = False

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> torch.Tensor:
        if self.stage != "mixers":
            return super().training_step(model, inputs, num_items_in_batch)
        model.train()
        input_ids = self._prepare_inputs(inputs)["input_ids"]
        with self.compute_loss_context_manager(), self.accelerator.autocast():
            return self._step_of_mixers(model, input_ids)

    def _step_of_mixers(self, model: nn.Module, input_ids: torch.Tensor) -> torch.Tensor:
        """One pass of the teacher. At each replaced layer the new mixer gets the same input, and its gradients at once."""
        config = model.config
        layout = decoder_layout(config, input_ids, None, None, None, model.dtype)
        replaced = [i for i, layer_type in enumerate(config.layer_types) if layer_type == "sliding_attention"]
        losses = []

        def compare(layer_idx: int):
            def hook(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
                with torch.enable_grad():
                    own, _ = model.model.layers[layer_idx].mixer(
                        args[0].detach(), layout, position_embeddings=kwargs["position_embeddings"]
                    )
                    target = output[0].detach().float()
                    loss = (own.float() - target).square().mean() / target.square().mean().clamp(min=1e-12)
                    # Divided here: `Trainer` divides what `compute_loss` returns.
                    scale = len(replaced) * self.current_gradient_accumulation_steps
                    self.accelerator.backward(loss / scale)
                losses.append(loss.detach())

            return hook

        hooks = [
            self.teacher.model.layers[i].mixer.register_forward_hook(compare(i), with_kwargs=True) for i in replaced
        ]
        try:
            with torch.no_grad():
                self.teacher.model(input_ids, use_cache=False)
        finally:
            for hook in hooks:
                hook.remove()
        return torch.stack(losses).mean() / self.current_gradient_accumulation_steps

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, **kwargs):
        if self.stage != "logits":
            return super().compute_loss(model, inputs, return_outputs, **kwargs)
        with torch.no_grad():
            target = self.teacher(inputs["input_ids"], use_cache=False).logits.float().log_softmax(-1).flatten(0, 1)
        outputs = model(input_ids=inputs["input_ids"], use_cache=False)
        own = outputs.logits.float().log_softmax(-1).flatten(0, 1)
        loss = F.kl_div(own, target, reduction="batchmean", log_target=True)
        return (loss, outputs) if return_outputs else loss


def license_of(arguments: LinearizeArguments) -> str:
    """
    The licence of the teacher, which its converted weights are under too.

    Raises:
        `ValueError`: no option names it, and no card of the teacher does.
    """
    if arguments.license is not None:
        return arguments.license
    name = arguments.model_name_or_path
    found = None
    if Path(name).is_dir():  # type: ignore[arg-type]
        card = Path(name, "README.md")  # type: ignore[arg-type]
        found = ModelCard.load(card).data.license if card.is_file() else None
    else:
        try:
            data = model_info(name).card_data  # type: ignore[arg-type]
            found = None if data is None else data.license
        except (OSError, HfHubHTTPError):
            found = None
    if not found:
        raise ValueError(
            f"No card of {name} names its licence, which the new model is under too: give it as --license."
        )
    return found if isinstance(found, str) else found[0]


def main() -> None:
    with user_errors():
        arguments, training = parse_arguments(
            (LinearizeArguments,),
            __doc__,
            output_dir="runs/linearized",
            per_device_train_batch_size=4,
            learning_rate=1e-3,
            weight_decay=0.0,
            logging_steps=10,
            save_strategy="steps",
            save_steps=50,
            save_total_limit=1,
        )
        if training.world_size > 1 or training.n_gpu > 1:
            raise ValueError("linearize trains in one process on one device: set CUDA_VISIBLE_DEVICES to one.")
        if training.max_steps > 0 or training.resume_from_checkpoint is not None:
            raise ValueError(
                "The stages have their own --steps, and the same command goes on by itself: leave --max_steps and "
                "--resume_from_checkpoint out."
            )
        folder = Path(training.output_dir)
        name = arguments.model_name_or_path
        check_teacher(name)
        license_ = license_of(arguments)
        teacher = convert_pretrained(
            load_teacher(name, dtype=arguments.dtype, attn_implementation=arguments.attn_implementation)
        )
        teacher.eval().to(training.device)
        tokenizer = AutoTokenizer.from_pretrained(name, padding_side="left", **gguf_options(name))
        splits = load_splits(
            # Held-out samples are blocks here, and not rows.
            _with_all_rows(arguments),
            standard_library_sources,
            {"text": arguments.text_column_name},
            seed=training.seed,
            embedded_name="Python's standard library",
        )
        held_out = to_blocks(splits["validation"]["text"], tokenizer, arguments.block_size, arguments.max_eval_samples)
        if not held_out:
            raise ValueError(f"The held-out text has less than --block_size {arguments.block_size} tokens: give more.")
        options = {
            "window": arguments.window,
            "sinks": arguments.sinks,
            "with_sum": arguments.with_sum,
            "untie_embeddings": arguments.untie_embeddings,
        }
        kept = layers_to_keep(arguments.keep_attention, teacher, held_out, **options)
        if len(kept) == teacher.config.num_hidden_layers:
            raise ValueError(f"--keep_attention {arguments.keep_attention} keeps every layer: nothing is replaced.")
        # Without training the gate stays closed: no sum is needed.
        options["with_sum"] = arguments.with_sum and any(arguments.steps)
        student = linearize(teacher, kept, **options)
        check_stages(folder / "stages", student, arguments)

    measured = {"the teacher": perplexity(teacher, held_out)}
    untrained = "windows and sinks alone, not trained"
    first = perplexity(student, held_out)
    print(
        f"{student.num_parameters():,} parameters; layers that attend to all tokens: {kept or 'none'}. Perplexity on "
        f"{len(held_out)} held-out blocks of {arguments.block_size} tokens: teacher {measured['the teacher']:.2f}, "
        f"not trained {first:.2f}.",
        flush=True,
    )
    history: list[dict[str, Any]] = []
    if any(arguments.steps):
        measured[untrained] = first
        history = train_stages(student, teacher, splits["train"]["text"], held_out, tokenizer, arguments, training)
        history.insert(0, {"stage": None, "step": 0, "tokens": 0, "eval_perplexity": first})
        print(f"Trained: {perplexity(student, held_out):.2f}.")
    finish(student, tokenizer, folder, arguments, measured, held_out, history, splits, license_, kept, training)


def _with_all_rows(arguments: LinearizeArguments) -> LinearizeArguments:
    arguments = copy.copy(arguments)
    arguments.max_eval_samples = None
    return arguments


def to_blocks(texts: Any, tokenizer: Any, block_size: int, most: int | None = None) -> list[dict[str, list[int]]]:
    """Texts joined, each after an end-of-text token, and cut into `input_ids` and `labels` of `block_size` tokens."""
    blocks: list[dict[str, list[int]]] = []
    tokens: list[int] = []
    for text in texts:
        tokens += [*tokenizer(text or "", add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        while len(tokens) >= block_size and (most is None or len(blocks) < most):
            block, tokens = tokens[:block_size], tokens[block_size:]
            blocks.append({"input_ids": block, "labels": list(block)})
        if most is not None and len(blocks) == most:
            break
    return blocks


def check_stages(folder: Path, student: PreTrainedModel, arguments: LinearizeArguments) -> None:
    """
    Begin the folder of the stages, or see that what was begun there was begun by the same command.

    Raises:
        `ValueError`: it was another one.
    """
    wanted = {
        **{
            name: str(getattr(arguments, name))
            for name in ("model_name_or_path", "steps", "learning_rates", "block_size", "dtype")
        },
        **{name: str(getattr(arguments, name)) for name in ("long_block_size", "chunk_length", "train_file")},
        "layer_types": str(student.config.layer_types),
        **{
            name: str(getattr(student.config, name))
            for name in ("sliding_window", "attention_sinks", "attention_sum", "tie_word_embeddings")
        },
    }
    path = folder / "command.json"
    if path.is_file():
        begun = read_json(path)
        # A run of an earlier version does not know every option.
        other = sorted(name for name in wanted if begun.get(name, wanted[name]) != wanted[name])
        if other:
            raise ValueError(
                f"{folder} holds a run with {', '.join(f'{name} {begun[name]}' for name in other)}, now "
                f"{', '.join(f'{name} {wanted[name]}' for name in other)}: give the same command, delete the folder, or "
                "choose another --output_dir."
            )
    elif any(arguments.steps):
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps(wanted).encode())


def train_stages(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    texts: Any,
    held_out: list[dict[str, list[int]]],
    tokenizer: Any,
    arguments: LinearizeArguments,
    training: TrainingArguments,
) -> list[dict[str, Any]]:
    """
    Train the student in place, each stage from its last checkpoint if an earlier run left one.

    Returns:
        `list[dict]`: the losses of the stages, and perplexities on the blocks `held_out` as `eval_perplexity`, with the
            steps counted through and the number of tokens seen.

    Raises:
        `KeyboardInterrupt`: Ctrl-C; the message says how to go on.
        `ValueError`: there is too little text for one block.
    """
    folder = Path(training.output_dir) / "stages"
    history: list[dict[str, Any]] = []
    tokens = steps_before = 0
    rates = learning_rates(arguments, training)
    for stage, steps, learning_rate in zip(STAGES, arguments.steps, rates, strict=True):
        if not steps:
            continue
        place = folder / stage
        block_size = arguments.long_block_size if stage == "text" else arguments.block_size
        of_step = training.per_device_train_batch_size * training.gradient_accumulation_steps
        if (place / FINISHED).is_file():
            log = read_json(place / FINISHED)["log_history"]
            student.load_state_dict(type(student).from_pretrained(place, dtype=student.dtype).state_dict())
        else:
            blocks = to_blocks(texts, tokenizer, block_size, steps * of_step)
            if not blocks:
                raise ValueError(f"The text for training has less than {block_size} tokens: give more.")
            for name, parameter in student.named_parameters():
                is_replaced = any(
                    name.startswith(f"model.layers.{i}.mixer.")
                    for i, layer_type in enumerate(student.config.layer_types)
                    if layer_type == "sliding_attention"
                )
                parameter.requires_grad_(stage != "mixers" or is_replaced)
            # The same numbers whether or not the stages before ran in this process.
            set_seed(training.seed)
            trainer = StageTrainer(
                model=student,
                args=_arguments_of_stage(training, place, steps, learning_rate),
                train_dataset=blocks,
                processing_class=tokenizer,
                data_collator=default_data_collator,
                stage=stage,
                teacher=teacher,
                chunk_length=min(arguments.chunk_length, block_size) if stage == "text" else None,
            )
            trainer.add_callback(HeldOutPerplexity(held_out))
            trainer.add_callback(StopAtInterrupt())
            print(f"Stage {stage}: {steps} steps of {of_step * block_size:,} tokens.", flush=True)
            trainer.train(resume_from_checkpoint=last_checkpoint(place))
            if trainer.state.global_step < steps:
                raise KeyboardInterrupt("give the same command again to go on.")
            student.requires_grad_(True).save_pretrained(place)
            log = trainer.state.log_history
            write_whole(place / FINISHED, json.dumps({"log_history": log}).encode())
            for checkpoint in place.glob("checkpoint-*"):
                shutil.rmtree(checkpoint)
        losses = [entry for entry in log if "loss" in entry]
        history += [
            {
                "stage": stage,
                "step": steps_before + entry["step"],
                "tokens": tokens + entry["step"] * of_step * block_size,
                name: entry[name],
            }
            for entry in log
            for name in ("loss", "eval_perplexity")
            if name in entry
        ]
        steps_before, tokens = steps_before + steps, tokens + steps * of_step * block_size
        if losses:
            print(
                f"Stage {stage}: the loss went from {losses[0]['loss']:.4f} to {losses[-1]['loss']:.4f}.", flush=True
            )
    student.config.use_cache = True
    return history


def learning_rates(arguments: LinearizeArguments, training: TrainingArguments) -> list[float]:
    """The learning rate of each stage."""
    return arguments.learning_rates or [
        training.learning_rate,
        training.learning_rate / 10,
        training.learning_rate / 10,
    ]


def _arguments_of_stage(
    training: TrainingArguments, place: Path, steps: int, learning_rate: float
) -> TrainingArguments:
    arguments = copy.copy(training)
    arguments.output_dir, arguments.max_steps, arguments.eval_strategy = str(place), steps, "no"
    arguments.learning_rate = learning_rate
    arguments.resume_from_checkpoint = None
    return arguments


def finish(
    student: PreTrainedModel,
    tokenizer: Any,
    folder: Path,
    arguments: LinearizeArguments,
    baselines: dict[str, float],
    held_out: list[dict[str, list[int]]],
    history: list[dict[str, Any]],
    splits: Any,
    license_: str,
    kept: list[int],
    training: TrainingArguments,
) -> None:
    """Save the model, its picture and its card, check that it loads, and remove the stages."""
    name = str(arguments.model_name_or_path)
    source = source_of(arguments, "Python's standard library")
    student.eval().save_pretrained(folder)
    tokenizer.model_max_length = model_max_length(student.config)
    tokenizer.save_pretrained(folder)
    if history:
        (folder / "stages.json").write_text(json.dumps(history, indent=1), encoding="utf-8")
        plot_training(
            history,
            folder / "training.png",
            metric="perplexity",
            baselines={"the teacher": baselines["the teacher"]},
            model_name=type(student).__name__,
            loss_unit=f"of the stages {', '.join(STAGES)}",
        )
    seen = history[-1]["tokens"] if history else 0
    layers = "no layer" if not kept else f"the layers {', '.join(map(str, kept))}"
    value = perplexity(student, held_out)
    print(f"The check of {printable(str(folder))}, where this package is not installed:")
    save_model_card(
        student,
        folder,
        dataset_name=f"{source}, {seen:,} tokens" if history else "none: the weights are those of the teacher",
        metrics={"perplexity": value},
        baselines={label: {"perplexity": number} for label, number in baselines.items()},
        evaluated_on=f"{splits['validation'].info.description}, blocks of {arguments.block_size} tokens",
        num_examples=len(held_out),
        base_model=name,
        license=license_,
        steps=sum(arguments.steps),
        hyperparameters={
            "window": arguments.window,
            "sinks": arguments.sinks,
            "steps of the stages": ", ".join(map(str, arguments.steps)),
            "learning rates of the stages": ", ".join(map(str, learning_rates(arguments, training))),
            "seed": training.seed,
        },
        limits=(
            f"- It is {printable(Path(name).name)} with other attention layers: {layers} of it still attends to all "
            f"tokens, and the others to the last {arguments.window} tokens and the first {arguments.sinks}. A fact that "
            "was named further back may be lost."
        ),
    )
    for stage in reversed(STAGES):
        # A stage without its mark is trained again, where one without its weights could not be read.
        (folder / "stages" / stage / FINISHED).unlink(missing_ok=True)
    shutil.rmtree(folder / "stages", ignore_errors=True)
    constant, per_token = decode_state_size(student) or (0, 0)
    print(
        f"Saved to {printable(str(folder))}. Perplexity {value:.2f}, of the teacher {baselines['the teacher']:.2f}. Decode "
        f"state of one sequence: {constant:,} bytes" + (f", and {per_token:,} a token." if per_token else ".")
    )


def command(arguments: list[str]) -> None:
    """Run by `python -m modeling_sumagg linearize`."""
    sys.argv = ["python -m modeling_sumagg linearize", *arguments]
    run(main)


__all__ = [
    "LinearizeArguments",
    "StageTrainer",
    "convert_pretrained",
    "gguf_options",
    "layers_to_keep",
    "linearize",
    "load_teacher",
    "perplexity",
    "to_blocks",
    "train_stages",
]
