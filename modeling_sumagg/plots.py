"""
The picture of a training run, and what makes others as easy to read.

It needs what the example scripts need: `pip install 'modeling-sumagg[examples]'`.
"""

import os
from collections.abc import Sequence
from typing import Any


try:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure
    from matplotlib.ticker import Formatter, LogLocator, MaxNLocator, NullLocator, StrMethodFormatter
except ImportError as error:
    raise ImportError(f"The plots need {error.name}: run `pip install 'modeling-sumagg[examples]'`.") from error


# What a metric is called on an axis, and its unit.
METRICS = {
    "accuracy": ("Accuracy", "share of right answers"),
    "perplexity": ("Perplexity", "per token"),
    "wer": ("Word error rate", "edits a word"),
    "r2": ("R²", "1: perfect, 0: the mean"),
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
        name, unit = METRICS.get(metric, (metric, ""))
        panels[1].set(title=f"{name} on the validation split", ylabel=f"{name} ({unit})" if unit else name)
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


__all__ = ["label_logarithmic", "plot_training"]
