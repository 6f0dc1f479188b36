"""What a reward stage's report shows of its held-out answers: charts, numbers and tables, from `reward_report.json`'s content."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from danlu.pipeline.report_charts import HEIGHT, INK, WIDTH, Chart, Interval, style, svg, whiskers
from danlu.pipeline.report_words import number

# loss -> what the calibration chart compares: its title, its axis, what it is held against
_CALIBRATION: Final = {
    "pointwise": ("Scores given to answers", "predicted score", "mean of the scores given"),
    "unpaired": ("Answers that were liked", "predicted probability", "share liked"),
}
_OF_PAIRS: Final = ("Right where it is so sure", "predicted probability", "share right")


def charts(key: str, report: Mapping[str, Any]) -> list[Chart]:
    """The drawings of a report; of one without held-out answers none."""
    found = []
    rows = report.get("calibration") or []
    percent = report.get("loss") != "pointwise"
    if rows:
        title, across, up = _CALIBRATION.get(str(report.get("loss")), _OF_PAIRS)
        found.append(Chart(title, _reliability(f"{key}-calibration", title, rows, across, up, percent), []))
    if report.get("margins"):
        found.append(Chart("Margins", _histogram(f"{key}-margins", "Margins", report["margins"]), []))
    for field, label, title in (
        ("by_source", "source", "Right, by source"),
        ("by_length", "chosen", "Right, by length"),
    ):
        parts = report.get(field) or []
        if len(parts) > 1 or (parts and field == "by_length"):
            intervals = [Interval(_name(p, label), p["share"], p["low"], p["high"]) for p in parts]
            found.append(Chart(title, whiskers(f"{key}-{label}", title, intervals), []))
    return found


def figures(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    """A report as label and value, for tables on the page and in a terminal: the whole first, its parts after it."""
    if not report:
        return []
    unit = "answers" if "answers" in report["heldout"] else "pairs"
    told = []
    if report.get("accuracy"):
        told.append((f"right on held-out {unit}", _share(report["accuracy"])))
    told += [(f"  from {_name(p, 'source')}", _share(p)) for p in report["by_source"] if len(report["by_source"]) > 1]
    told += [(f"  chosen answer {_name(p, 'chosen')}", _share(p)) for p in report["by_length"]]
    metrics = report["metrics"]
    if "eval_auc" in metrics:
        own = {end: metrics[f"eval_auc{end}"] for end in ("", "_low", "_high")}
        interval = f"95% interval {number(own['_low'], True)} – {number(own['_high'], True)}"
        told.append(("liked above others (AUC)", f"{number(own[''], True)} ({interval})"))
    told += [
        (label, number(metrics[name]))
        for name, label in (
            ("eval_r2", "R² of the scores"),
            ("eval_spearman", "Spearman's correlation with the scores"),
            ("eval_length_correlation", "correlation of score and length"),
        )
        if name in metrics
    ]
    if report.get("calibration_error") is not None:
        told.append(("calibration error", number(report["calibration_error"], report["loss"] != "pointwise")))
    return told + _repeats(report.get("repeats"))


def _repeats(repeats: Mapping[str, float] | None) -> list[tuple[str, str]]:
    if not repeats:
        return []
    of = f"of {number(repeats['labels'])} labels for {number(repeats['repeated'])} things"
    if "difference" in repeats:
        return [("difference of scores given twice", f"{number(repeats['difference'])} (mean, {of})")]
    best = f"no model is right on more than about {number(repeats['ceiling'], True)}"
    return [("people agree with people", f"{number(repeats['agreement'], True)} ({of}; {best})")]


def _share(part: Mapping[str, Any]) -> str:
    low, high = number(part["low"], True), number(part["high"], True)
    return f"{number(part['share'], True)} of {number(part['count'])} (95% interval {low} – {high})"


def _name(part: Mapping[str, Any], label: str) -> str:
    return str(part[label]) or "not named"


def _reliability(key: str, title: str, rows: Sequence[Mapping[str, float]], across: str, up: str, percent: bool) -> str:
    """Dots, the larger the more is in their bin, beside the line on which predictions come true."""
    from matplotlib.figure import Figure

    with style():
        figure = Figure(figsize=(WIDTH, HEIGHT))
        axes = figure.add_axes((0.15, 0.2, 0.83, 0.76))
        x, y = [r["predicted"] for r in rows], [r["found"] for r in rows]
        ends = min([*x, *y]), max([*x, *y])
        axes.plot(ends, ends, color=INK["soft"], linewidth=0.9, linestyle=(0, (4, 4)))
        axes.plot(x, y, color=INK["first"], linewidth=1.2, alpha=0.5)
        most = max(r["count"] for r in rows)
        axes.scatter(x, y, [12 + 60 * r["count"] / most for r in rows], color=INK["first"], linewidths=0)
        _plain(axes, "both")
        if percent:
            for axis in (axes.xaxis, axes.yaxis):
                axis.set_major_formatter(lambda value, _: number(round(value, 6), percent=True))
        axes.set_xlabel(across, fontsize=8.5, loc="right", labelpad=1)
        axes.set_ylabel(up, fontsize=8.5)
        return svg(figure, key, title)


def _histogram(key: str, title: str, rows: Sequence[Mapping[str, float]]) -> str:
    """Bars; those of wrong decisions, left of 0, in another colour."""
    from matplotlib.figure import Figure

    with style():
        figure = Figure(figsize=(WIDTH, HEIGHT))
        axes = figure.add_axes((0.135, 0.2, 0.845, 0.76))
        colours = [INK["first"] if r["from"] + r["to"] > 0 else INK["third"] for r in rows]
        widths = [0.92 * (r["to"] - r["from"]) for r in rows]
        centres = [(r["from"] + r["to"]) / 2 for r in rows]
        axes.bar(centres, [r["count"] for r in rows], widths, color=colours, linewidth=0)
        axes.axvline(0, color=INK["soft"], linewidth=0.9, linestyle=(0, (4, 4)))
        _plain(axes, "y")
        axes.set_xlabel("margin (left of 0: wrong)", fontsize=8.5, loc="right", labelpad=1)
        return svg(figure, key, title)


def _plain(axes: Any, grid: str) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.grid(axis=grid, color=INK["grid"], linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "left", "right"]].set_visible(False)
    axes.tick_params(length=0, pad=5)
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.yaxis.set_major_locator(MaxNLocator(4))
