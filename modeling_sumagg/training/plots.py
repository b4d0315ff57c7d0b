"""
The picture of a training run, and what makes others as easy to read.

It needs what the example scripts need: `pip install 'modeling-sumagg[examples]'`.
"""

import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import PreTrainedModel, ProcessorMixin


try:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure
    from matplotlib.ticker import Formatter, LogLocator, MaxNLocator, NullLocator, StrMethodFormatter
except ImportError as error:
    raise ImportError(f"The plots need {error.name}: run `pip install 'modeling-sumagg[examples]'`.") from error


class Metric(NamedTuple):
    """
    How a metric is shown.

    Attributes:
        title (`str`): its name.
        unit (`str`): its unit on an axis.
        is_share (`bool`): shown in percent.
        is_better_lower (`bool`): smaller values are better.
        logarithmic (`bool`): its axis is logarithmic.
    """

    title: str
    unit: str = ""
    is_share: bool = False
    is_better_lower: bool = False
    logarithmic: bool = False


METRICS = {
    "accuracy": Metric("Accuracy", "share of right answers", is_share=True),
    "perplexity": Metric("Perplexity", "per token", is_better_lower=True, logarithmic=True),
    "wer": Metric("Word errors", "edits a word", is_share=True, is_better_lower=True),
    "cer": Metric("Character errors", "edits a character", is_share=True, is_better_lower=True),
    "r2": Metric("R²", "1: perfect, 0: the mean"),
    "rmse": Metric("RMSE", is_better_lower=True),
}
# Of a name at the end of a line, as a share of the height of the axes.
NAME_HEIGHT = 0.055


def plot_training(
    log_history: Sequence[dict[str, Any]],
    path: str | os.PathLike,
    *,
    metric: str | None = None,
    baselines: dict[str, float] | None = None,
    model_name: str = "this model",
    loss_unit: str = "nats",
    logarithmic: bool = False,
) -> None:
    """
    Draw how the losses of a run went and, in a panel of its own, a validation metric beside that of the baselines.

    The model is always blue, and the baselines have the colours after it in their order: the same in every picture of
    a run, if they are given in the same order.

    Args:
        log_history (`Sequence[dict]`): `trainer.state.log_history`.
        path (`str` or `os.PathLike`): the PNG to write.
        metric (`str`, *optional*): the name of the validation metric, without its prefix `eval_`. By default there is
            only the panel of the losses.
        baselines (`dict[str, float]`, *optional*): by name, the baselines' values of the metric (without one: of the
            loss) on the same validation split.
        model_name (`str`, defaults to `"this model"`): what to call the model.
        loss_unit (`str`, defaults to `"nats"`): the unit of the loss.
        logarithmic (`bool`, defaults to `False`): whether the axis of the metric is logarithmic.
    """
    steps = max((entry["step"] for entry in log_history), default=0)
    figure = Figure(figsize=(12 if metric else 7, 4), layout="constrained")
    panels = list(figure.subplots(1, 2 if metric else 1, squeeze=False)[0])
    lines = [("loss", "training", "C0", ":"), ("eval_loss", "validation", "C0", "-")]
    _draw(panels[0], log_history, lines, {} if metric else baselines or {}, steps)
    panels[0].set(title="Loss", ylabel=f"loss ({loss_unit})")
    if metric:
        if logarithmic:
            panels[1].set_yscale("log")
        _draw(panels[1], log_history, [(f"eval_{metric}", model_name, "C0", "-")], baselines or {}, steps)
        name, unit, *_ = METRICS.get(metric, Metric(metric))
        panels[1].set(title=f"{name} on the validation split", ylabel=f"{name} ({unit})" if unit else name)
    figure.savefig(path, dpi=120)


def plot_predictions(
    predictions: dict[str, np.ndarray], labels: np.ndarray, label_name: str, path: str | os.PathLike
) -> None:
    """
    Draw the predictions of a regression over the labels, a panel for each model, with the line on which they agree.

    Args:
        predictions (`dict[str, np.ndarray]`): by the name of a model, its predictions `[N]`.
        labels (`np.ndarray` of shape `[N]`): the true values.
        label_name (`str`): what they are, with the unit.
        path (`str` or `os.PathLike`): the PNG to write.
    """
    figure = Figure(figsize=(4 * len(predictions), 4.2), layout="constrained")
    panels = figure.subplots(1, len(predictions), sharex=True, sharey=True, squeeze=False)[0]
    for index, (axes, (name, values)) in enumerate(zip(panels, predictions.items(), strict=True)):
        r2 = 1 - np.mean((labels - values) ** 2) / np.var(labels)
        axes.scatter(labels, values, s=8, alpha=0.4, color=f"C{index}", edgecolors="none")
        axes.axline((labels.mean(), labels.mean()), slope=1, color="black", linewidth=1)
        axes.set_title(f"{name}\nR² {r2:.3f}", color=f"C{index}", fontsize=11)
        axes.spines[["top", "right"]].set_visible(False)
    figure.supxlabel(f"{label_name}, true (black line: predicted = true)")
    panels[0].set_ylabel("predicted")
    figure.savefig(path, dpi=120)


def plot_alignment(
    model: PreTrainedModel, processor: ProcessorMixin, row: dict[str, Any], path: str | os.PathLike
) -> None:
    """
    Draw the frames of an utterance and, below them in the same time, the probability of every symbol.

    Args:
        model (`PreTrainedModel`): a model for CTC.
        processor (`ProcessorMixin`): names the symbols.
        row (`dict`): `input_features` `[F, num_mel_bins]`, 100 frames a second, and `labels`, what is said.
        path (`str` or `os.PathLike`): the PNG to write.
    """
    frames = torch.as_tensor(np.asarray(row["input_features"]), device=model.device)
    with torch.no_grad():
        probabilities = model(frames[None].to(model.dtype)).logits[0].float().softmax(dim=-1).cpu().numpy()
    seconds, tokenizer = len(frames) / 100, processor.tokenizer
    figure = Figure(figsize=(12, 7), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(1, 1.4))
    image = above.imshow(
        frames.cpu().numpy().T, origin="lower", aspect="auto", extent=(0, seconds, 0, frames.shape[1]), cmap="magma"
    )
    figure.colorbar(image, ax=above, label="log energy")
    above.set(ylabel="mel bin", title=f"Said: {tokenizer.decode(row['labels'], group_tokens=False)}")
    for index, name in enumerate(tokenizer.convert_ids_to_tokens(range(probabilities.shape[1]))):
        times = (np.arange(len(probabilities)) + 1) * seconds / max(len(probabilities), 1)
        blank = index == tokenizer.pad_token_id
        below.plot(times, probabilities[:, index], color="lightgrey" if blank else f"C{index % 10}", linewidth=1.2)
        emitted = (probabilities.argmax(axis=1) == index) & (not blank)
        for start in np.flatnonzero(emitted & ~np.roll(emitted, 1)):
            name_shown = "␣" if name == tokenizer.word_delimiter_token else name
            below.annotate(name_shown, (times[start], 1.02), ha="center", color=f"C{index % 10}")
    heard = tokenizer.decode(probabilities.argmax(axis=1))
    below.set(
        ylabel="probability (grey: blank)", xlabel="seconds of audio heard", ylim=(0, 1.12), title=f"Heard: {heard}"
    )
    for axes in (above, below):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)


def _draw(
    axes: Axes,
    log_history: Sequence[dict[str, Any]],
    lines: list[tuple[str, str, str, str]],
    baselines: dict[str, float],
    steps: int,
) -> None:
    """The logged values of each of `lines` (key, name, colour, style) over the steps, and a line for each baseline."""
    ends = []
    for key, name, color, style in lines:
        points = [(entry["step"], entry[key]) for entry in log_history if key in entry]
        if points:
            axes.plot(
                *zip(*points, strict=True), color=color, linestyle=style, marker="o", markersize=3, clip_on=False
            )
            ends.append((points[-1][1], f"{name} {points[-1][1]:.4g}", color))
    for index, (name, value) in enumerate(baselines.items(), start=1):
        axes.axhline(value, color=f"C{index}", linestyle="--")
        ends.append((value, f"{name} {value:.4g}", f"C{index}"))
    axes.set(xlabel="optimizer step", xlim=(0, max(steps, 1)))
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    if axes.get_yscale() == "log":
        label_logarithmic(axes.yaxis)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.3)
    _name_ends(axes, ends)


def label_logarithmic(axis: Axis, formatter: str | Formatter = "{x:,g}") -> None:
    """
    Several round ticks on a logarithmic axis, however long it is, with their numbers written out.

    Args:
        axis (`matplotlib.axis.Axis`): of axes to which nothing is added later.
        formatter (`str` or `matplotlib.ticker.Formatter`, defaults to `"{x:,g}"`): how to write a number.
    """
    low, high = axis.get_view_interval()
    # A decade has few round numbers: several ticks need more of them.
    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if high > 30 * low else (1, 1.5, 2, 3, 5, 7)))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(StrMethodFormatter(formatter) if isinstance(formatter, str) else formatter)


def _name_ends(axes: Axes, ends: list[tuple[float, str, str]]) -> None:
    """Write each name right of its line, in its colour, moved apart where lines end close to each other."""
    ends = sorted(ends)
    to_fraction = axes.transScale + axes.transLimits
    heights = [to_fraction.transform((1, value))[1] for value, _, _ in ends]
    for index in range(1, len(heights)):
        heights[index] = max(heights[index], heights[index - 1] + NAME_HEIGHT)
    highest = 1.0
    for index in reversed(range(len(heights))):
        heights[index] = min(heights[index], highest)
        highest = heights[index] - NAME_HEIGHT
    for height, (_, name, color) in zip(heights, ends, strict=True):
        axes.annotate(
            name,
            (1, height),
            xycoords="axes fraction",
            xytext=(6, 0),
            textcoords="offset points",
            color=color,
            fontsize=9,
            va="center",
        )


__all__ = ["METRICS", "Metric", "label_logarithmic", "plot_alignment", "plot_predictions", "plot_training"]
