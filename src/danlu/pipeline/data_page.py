"""The page that `danlu data stats --html` writes: one file with plots, in the report's style."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined

from danlu import atomic
from danlu.data.stats import Statistics, leading
from danlu.pipeline import report_charts
from danlu.pipeline.report_charts import INK, WIDTH

BINS: Final = 30
CLIPPED: Final = 0.99  # a few very long rows would leave the rest in one bar
BAR_HEIGHT: Final = 0.27  # inches


@dataclass(frozen=True, slots=True)
class Curve:
    """Values whose distribution is drawn. `ink` is a key of INK."""

    label: str
    values: Sequence[int]
    ink: str = "first"


@dataclass(frozen=True, slots=True)
class Plot:
    """A drawing with its title and the curves that its legend names."""

    title: str
    svg: str
    legend: list[Curve]


def write_page(path: Path, title: str, found: Statistics) -> None:
    """Write the page.

    Args:
        path: the HTML file.
        title: what the data is called.
        found: the numbers, finished.
    """
    environment = Environment(
        loader=PackageLoader("danlu.pipeline", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template("data_page.html.jinja").render(
        title=title,
        records=f"{found.records:,}",
        kinds=leading(found.kinds, ""),
        tiles=_tiles(found),
        plots=_plots(found),
    )
    atomic.write_text(path, page)


def _tiles(found: Statistics) -> list[tuple[str, str]]:
    numbers = found.to_json()
    tiles = [("records", f"{found.records:,}")]
    for name, title in (("lengths", "of a row"), ("questions", "of a question"), ("answers", "of an answer")):
        if "median" in numbers[name]:
            tiles.append((f"median length {title}, {numbers[name]['unit']}", f"{numbers[name]['median']:,}"))
    if len(found.chosen_lengths):
        better, worse = np.asarray(found.chosen_lengths), np.asarray(found.rejected_lengths)
        tiles.append(("pairs whose better answer is the longer one", f"{float((better > worse).mean()):.0%}"))
    return tiles


def _plots(found: Statistics) -> list[Plot]:
    plots = [histogram("rows", f"Length of rows, {found.unit}", [Curve("rows", found.lengths)])]
    spoken = [Curve("questions", found.question_lengths, "second"), Curve("answers", found.answer_lengths)]
    if any(len(curve.values) for curve in spoken):
        plots.append(histogram("spoken", "Length of questions and answers, characters", spoken))
    if len(found.chosen_lengths):
        pair = [Curve("rejected", found.rejected_lengths, "second"), Curve("chosen", found.chosen_lengths)]
        plots.append(histogram("pair", "Length of chosen and rejected answers, characters", pair))
    if set(found.turns) - {0}:
        turns = sorted(found.turns.items())
        shown = [(str(count), rows) for count, rows in turns[:12]]
        rest = sum(rows for _, rows in turns[12:])
        plots.append(bars("turns", "Messages in a row", shown + ([("more", rest)] if rest else [])))
    plots.append(bars("languages", "Languages, by script", leading(found.languages, "")))
    plots.append(bars("formats", "Formats", leading(found.formats, "")))
    plots.append(bars("sources", "Sources, or files that name none", leading(found.sources, "not named")))
    plots.append(bars("licences", "Licences", leading(found.licences, "not named")))
    return plots


def histogram(key: str, title: str, curves: Sequence[Curve]) -> Plot:
    """Distributions over the same axis, each scaled to shares; the longest hundredth is put into the last bar."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    drawn = [(curve, np.asarray(curve.values, dtype=np.int64)) for curve in curves if len(curve.values)]
    limit = max((int(np.quantile(values, CLIPPED)) for _, values in drawn), default=1)
    lowest = min((int(values.min()) for _, values in drawn), default=0)
    edges = np.linspace(lowest, max(limit, lowest + 1), BINS + 1)
    with report_charts.style():
        figure = Figure(figsize=(WIDTH, 2.2))
        axes = figure.add_axes((0.135, 0.17, 0.845, 0.79))
        for curve, values in drawn:
            counts, _ = np.histogram(np.minimum(values, edges[-1]), bins=edges)
            axes.stairs(counts / len(values), edges, color=INK[curve.ink], fill=True, alpha=0.22)
            axes.stairs(counts / len(values), edges, color=INK[curve.ink], linewidth=1.6)
        axes.grid(axis="y", color=INK["grid"], linewidth=0.8)
        axes.set_axisbelow(True)
        axes.margins(x=0.01)
        axes.spines[["top", "left", "right"]].set_visible(False)
        axes.tick_params(length=0, pad=5)
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(4))
        axes.yaxis.set_major_formatter(PercentFormatter(1))
        svg = report_charts.svg(figure, key, title)
    return Plot(title, svg, [curve for curve, _ in drawn] if len(drawn) > 1 else [])


def bars(key: str, title: str, counts: Sequence[tuple[str, int]]) -> Plot:
    """Horizontal bars with their counts, in the given order from the top."""
    from matplotlib.figure import Figure

    height = 0.2 + BAR_HEIGHT * max(len(counts), 1)
    total = max(sum(count for _, count in counts), 1)
    with report_charts.style():
        figure: Any = Figure(figsize=(WIDTH, height))
        axes = figure.add_axes((0.3, 0.02, 0.46, 0.96))
        places = range(len(counts))
        axes.barh(list(places), [count for _, count in counts], color=INK["first"], height=0.62, alpha=0.85)
        for place, (_, count) in zip(places, counts, strict=True):
            share = f"{count / total:.0%}" if count * 100 >= total else "<1%"
            axes.annotate(
                f"{count:,} · {share}",
                (count, place),
                (4, 0),
                textcoords="offset points",
                va="center",
                color=INK["soft"],
                fontsize=8.5,
            )
        axes.set_yticks(list(places), [report_charts.short(name, 20) for name, _ in counts])
        axes.set_ylim(len(counts) - 0.4, -0.6)
        axes.set_xticks([])
        axes.spines[["top", "left", "right", "bottom"]].set_visible(False)
        axes.tick_params(length=0, pad=5)
        svg = report_charts.svg(figure, key, title)
    return Plot(title, svg, [])
