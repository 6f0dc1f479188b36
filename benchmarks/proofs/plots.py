"""The proofs' plots: SVG by matplotlib, the same bytes for the same numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

GOLD, PROXY, MARK = "#b8860b", "#4c72b0", "#c44e52"


def overoptimisation(
    path: Path, curves: Mapping[str, Sequence[Mapping[str, float]]], fired: Mapping[str, int | None]
) -> None:
    """Gold (left axis) and proxy (right axis) over sqrt(KL) for each proxy; a line where the rule fired.

    Args:
        curves: evaluations of each proxy: step, kl, gold, proxy.
        fired: step of each proxy at which the rule fired.
    """
    figure, axes = _figure(len(curves))
    for axis, (name, points) in zip(axes, curves.items(), strict=True):
        xs = [max(0.0, p["kl"]) ** 0.5 for p in points]
        axis.plot(xs, [p["gold"] for p in points], color=GOLD, marker=".", label="gold (rubric)")
        right = axis.twinx()
        right.plot(xs, [p["proxy"] for p in points], color=PROXY, linestyle="--", label="proxy (reward model)")
        for x, p in zip(xs, points, strict=True):
            if p["step"] == fired.get(name):
                axis.axvline(x, color=MARK, linewidth=1, label="P-REWARD-HACK")
        axis.set_title(f"{name} proxy")
        axis.set_xlabel("sqrt(KL to the start), nats per answer")
        axis.set_ylabel("gold", color=GOLD)
        right.set_ylabel("proxy", color=PROXY)
        lines = [*axis.get_legend_handles_labels()[0], *right.get_legend_handles_labels()[0]]
        below = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.18), "ncol": 3, "frameon": False}
        axis.legend(lines, [line.get_label() for line in lines], fontsize=7, **below)
    _save(figure, path)


def beside(path: Path, sides: Mapping[str, Sequence[Sequence[tuple[float, float]]]]) -> None:
    """Score over KL for each side, one thin line a seed."""
    figure, (axis,) = _figure(1)
    for (name, seeds), colour in zip(sides.items(), (GOLD, PROXY), strict=True):
        for number, points in enumerate(seeds):
            label = name if number == 0 else None
            axis.plot([p[0] for p in points], [p[1] for p in points], color=colour, linewidth=1, alpha=0.8, label=label)
    axis.set_xlabel("KL to the start, nats per answer")
    axis.set_ylabel("raw reward")
    axis.legend(fontsize=8)
    _save(figure, path)


def scores(path: Path, runs: Mapping[str, Sequence[Sequence[float]]]) -> None:
    """Score over iterations, one line a method."""
    figure, (axis,) = _figure(1)
    for (name, points), colour in zip(runs.items(), (GOLD, PROXY, MARK), strict=False):
        axis.plot([p[0] for p in points], [p[1] for p in points], color=colour, label=name)
    axis.set_xlabel("iteration")
    axis.set_ylabel("share of right answers in the roll-outs")
    axis.legend(fontsize=8)
    _save(figure, path)


def _figure(panels: int) -> Any:
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    matplotlib.rcParams.update({"svg.hashsalt": "danlu", "svg.fonttype": "none", "font.size": 9})
    figure, axes = pyplot.subplots(1, panels, figsize=(4.6 * panels, 3.2), squeeze=False)
    return figure, list(axes[0])


def _save(figure: Any, path: Path) -> None:
    from matplotlib import pyplot

    path.parent.mkdir(parents=True, exist_ok=True)
    figure.tight_layout()
    figure.savefig(path, format="svg", metadata={"Date": None})
    pyplot.close(figure)
