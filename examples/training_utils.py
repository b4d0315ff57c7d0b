"""What the training scripts have in common: tokenizers, baselines, plots, and the check of what was saved."""

from collections.abc import Iterable, Iterator
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast, Trainer

from modeling_sumagg.training import decay_parameter_names


END_OF_TEXT = "<|endoftext|>"


class WeightDecayTrainer(Trainer):
    """[`~transformers.Trainer`] with the weight decay of the original models, see [`decay_parameter_names`]."""

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        return decay_parameter_names(model)


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """
    A byte-level BPE tokenizer as GPT-2's, learned from `texts`: any string can be encoded, and comes back exactly.

    The one special token, `<|endoftext|>`, ends documents and pads.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    tokenizer.train_from_iterator(texts, trainer=trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT, pad_token=END_OF_TEXT
    )


def concatenated_blocks(documents: Iterable[list[int]], separator_id: int, block_size: int) -> Iterator[list[int]]:
    """Join the tokens of the documents, a separator after each, and cut them into whole blocks; the rest is dropped."""
    buffer: list[int] = []
    for document in documents:
        buffer += [*document, separator_id]
        end = len(buffer) - len(buffer) % block_size
        for start in range(0, end, block_size):
            yield buffer[start : start + block_size]
        buffer = buffer[end:]


def unigram_cross_entropy(training_tokens: Iterable[list[int]], tokens: Iterable[list[int]], vocab_size: int) -> float:
    """
    Mean negative log-likelihood, in nats, of `tokens` under the frequencies of the training tokens (add-one smoothed):
    the best that a model can do that looks at no context. A language model does not predict the first token of a
    sequence, so that is not counted in `tokens` either.
    """
    counts = np.ones(vocab_size)
    for sequence in training_tokens:
        counts += np.bincount(sequence, minlength=vocab_size)
    negative_log_likelihood = np.log(counts.sum()) - np.log(counts)
    return float(np.mean(np.concatenate([negative_log_likelihood[sequence[1:]] for sequence in tokens])))


def check_reload(
    auto_class: type, model: PreTrainedModel, folder: str, inputs: dict[str, torch.Tensor]
) -> PreTrainedModel:
    """
    Load what was saved in `folder` through an Auto class, compare it with the model in memory, and return it.

    Raises:
        `RuntimeError`: the logits differ in any bit.
    """
    model = model.eval()
    reloaded = auto_class.from_pretrained(folder).to(model.device).eval()
    inputs = {name: tensor.to(model.device) for name, tensor in inputs.items()}
    with torch.no_grad():
        expected, logits = model(**inputs).logits, reloaded(**inputs).logits
    if not torch.equal(expected, logits):
        difference = (expected - logits).abs().max().item()
        raise RuntimeError(f"The model saved in {folder} gives other logits than the trained one, by {difference}.")
    return reloaded


def plot_training(log_history: list[dict], metric: str, references: dict[str, float], path: Path) -> None:
    """
    Plot a finished training.

    Args:
        log_history (`list[dict]`): `trainer.state.log_history`.
        metric (`str`): the validation metric to draw beside the losses, without its prefix `eval_`.
        references (`dict[str, float]`): values of the same metric to draw as horizontal lines, by their labels.
        path (`Path`): the PNG to write.
    """
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for axes, key, label in (
        (left, "loss", "training"),
        (left, "eval_loss", "validation"),
        (right, f"eval_{metric}", "validation"),
    ):
        points = [(entry["step"], entry[key]) for entry in log_history if key in entry]
        if points:
            axes.plot(*zip(*points, strict=True), marker="o", markersize=3, label=label)
    for index, (name, value) in enumerate(references.items(), start=2):
        right.axhline(value, color=f"C{index}", linestyle="--", label=f"{name}: {value:.4g}")
    left.set(xlabel="step", ylabel="loss", title="Loss")
    right.set(xlabel="step", ylabel=metric, title=metric.capitalize())
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
    figure.savefig(path, dpi=150)
    plt.close(figure)
