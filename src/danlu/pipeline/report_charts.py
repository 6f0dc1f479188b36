"""The report's charts: SVG that takes its colours from the page, so one drawing serves light, dark and print."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final

from danlu.training.curves import Points, Rows, points

# matplotlib draws in these; afterwards each becomes a variable of the page's style sheet.
INK: Final = {
    "first": "#fe0001",
    "second": "#fe0002",
    "third": "#fe0003",
    "soft": "#fe0004",
    "grid": "#fe0005",
}
WIDTH, HEIGHT = 4.2, 2.2  # inches of 72 units: about the size on the page, so that text keeps its size
SMOOTH_FROM = 40  # shorter curves are drawn as they are
SHOWN_POINTS = 400  # more than a chart of this size can show
_RC: Final = {
    "svg.fonttype": "none",
    "svg.hashsalt": "danlu",
    "font.size": 9,
    "font.family": "sans-serif",
    "axes.edgecolor": INK["grid"],
    "axes.labelcolor": INK["soft"],
    "xtick.color": INK["soft"],
    "ytick.color": INK["soft"],
    "text.parse_math": False,
}


@dataclass(frozen=True)
class Series:
    """One line of a chart. `ink` is a key of INK; `noisy` lines are drawn faint with their running mean on top."""

    label: str
    points: Points
    ink: str = "first"
    noisy: bool = False


@dataclass(frozen=True)
class Chart:
    """A drawing with what its legend says."""

    title: str
    svg: str
    series: list[Series]
    percent: bool = False


@dataclass(frozen=True)
class Interval:
    """A mean with its 95% interval, of one model."""

    label: str
    mean: float
    low: float
    high: float


def lines(
    key: str,
    title: str,
    series: Sequence[Series],
    *,
    x_label: str = "step",
    percent: bool = False,
    band: tuple[Points, Points] | None = None,
    level: float | None = None,
    span: tuple[float, float] | None = None,
) -> str:
    """A line chart.

    Args:
        key: unique in the page, a prefix of the drawing's ids.
        title: read out by screen readers.
        band: lower and upper edge of a shaded interval.
        level: a dashed horizontal line to compare with.
        span: first and last x; none: those of the lines.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    with style():
        figure = Figure(figsize=(WIDTH, HEIGHT))
        axes = figure.add_axes((0.135, 0.2, 0.845, 0.76))
        if level is not None:
            axes.axhline(level, color=INK["soft"], linewidth=0.9, linestyle=(0, (4, 4)))
        if band is not None and band[0]:
            steps = [s for s, _ in band[0]]
            edges = [v for _, v in band[0]], [v for _, v in band[1]]
            axes.fill_between(steps, *edges, color=INK["second"], alpha=0.16, linewidth=0)
        for one in series:
            _draw(axes, one)
        axes.margins(x=0.015, y=0.12)
        if span is not None and span[0] < span[1]:
            edge = 0.015 * (span[1] - span[0])
            axes.set_xlim(span[0] - edge, span[1] + edge)
        axes.grid(axis="y", color=INK["grid"], linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "left", "right"]].set_visible(False)
        axes.tick_params(length=0, pad=5)
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(4))
        if percent:
            axes.yaxis.set_major_formatter(PercentFormatter(1))  # with as many decimals as tell the ticks apart
        axes.set_xlabel(x_label, fontsize=8.5, loc="right", labelpad=1)
        return svg(figure, key, title)


def _draw(axes: Any, one: Series) -> None:
    shown = _thin(one.points)
    steps, heights = [s for s, _ in shown], [v for _, v in shown]
    color = INK[one.ink]
    if one.noisy and len(shown) >= SMOOTH_FROM:
        axes.plot(steps, heights, color=color, linewidth=0.8, alpha=0.28)
        axes.plot(steps, _running_mean(heights, max(3, len(shown) // 20)), color=color, linewidth=1.9)
        return
    marker = "o" if len(shown) <= 16 else None
    axes.plot(steps, heights, color=color, linewidth=1.9, marker=marker, markersize=3.6, solid_capstyle="round")


def whiskers(key: str, title: str, intervals: Sequence[Interval]) -> str:
    """Dots with their intervals, one row a model, on a scale from 0% to 100%."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter

    names = [short(i.label) for i in intervals]
    left = min(0.36, 0.06 + 0.021 * max((_width(n) for n in names), default=0))
    height = 0.5 + 0.34 * len(intervals)
    with style():
        figure = Figure(figsize=(WIDTH, height))
        axes = figure.add_axes((left, 0.32 / height, 0.94 - left, 1 - 0.42 / height))
        rows = [-i for i in range(len(intervals))]
        for row, one in zip(rows, intervals, strict=True):
            axes.plot(
                [one.low, one.high], [row, row], color=INK["first"], linewidth=2, alpha=0.45, solid_capstyle="round"
            )
            axes.plot([one.mean], [row], color=INK["first"], marker="o", markersize=6)
            label = f"{one.mean:.0%}"
            axes.annotate(
                label, (one.mean, row), (0, 6), textcoords="offset points", ha="center", color=INK["soft"], fontsize=8.5
            )
        axes.set_xlim(-0.02, 1.02)
        axes.set_ylim(-len(intervals) + 0.45, 0.75)
        axes.set_yticks(rows, names)
        axes.grid(axis="x", color=INK["grid"], linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "left", "right", "bottom"]].set_visible(False)
        axes.tick_params(length=0, pad=6)
        axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        return svg(figure, key, title)


Plan = tuple[str, list[Series], dict[str, Any]]  # title, series, options of `lines`


def stage_charts(key: str, kind: str, rows: Rows) -> list[Chart]:
    """The curves of a stage that rolls nothing out, as far as they were logged."""

    def of(label: str, name: str, ink: str = "first", noisy: bool = False) -> Series:
        return Series(label, points(rows, name), ink, noisy)

    loss: Plan = ("Loss", [of("training", "loss", noisy=True), of("held-out", "eval_loss", "second")], {})
    norm: Plan = ("Gradient norm", [of("norm", "grad_norm", noisy=True)], {})
    low, high = points(rows, "eval_accuracy_low"), points(rows, "eval_accuracy_high")
    accuracy = [of("training", "accuracy", noisy=True), of("held-out", "eval_accuracy", "second")]
    planned: dict[str, list[Plan]] = {
        "pretrain": [loss, norm],
        "sft": [loss, norm],
        "reward": [("Pairs ranked rightly", accuracy, {"percent": True, "band": (low, high), "level": 0.5}), loss],
        "dpo": [
            ("Pairs ranked rightly", accuracy, {"percent": True, "band": (low, high), "level": 0.5}),
            loss,
            (
                "Implicit reward",
                [of("chosen", "chosen_reward", noisy=True), of("rejected", "rejected_reward", "third", True)],
                {},
            ),
            norm,
        ],
    }
    return draw(key, planned.get(kind, []), "step")


def draw(key: str, plans: Iterable[Plan], x_label: str, span: tuple[float, float] | None = None) -> list[Chart]:
    """Those of the planned charts that have a curve; with a `span` all of them have one x axis."""
    drawn: list[Chart] = []
    for title, series, options in plans:
        shown = [s for s in series if s.points]
        if not any(len(s.points) > 1 for s in shown):
            continue
        drawing = lines(f"{key}-{len(drawn)}", title, shown, x_label=x_label, span=span, **options)
        drawn.append(Chart(title, drawing, shown, bool(options.get("percent"))))
    return drawn


def style() -> Any:
    import matplotlib

    return matplotlib.rc_context(_RC)


def svg(figure: Any, key: str, title: str) -> str:
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    buffer = io.BytesIO()
    with warnings.catch_warnings():
        # Text stays text, so the browser's fonts count, not whether matplotlib's own has the glyph.
        warnings.filterwarnings("ignore", message="Glyph .* missing from", category=UserWarning)
        FigureCanvasSVG(figure).figure.savefig(
            buffer, format="svg", transparent=True, metadata=dict.fromkeys(("Creator", "Date", "Format", "Type"))
        )
    return _inline(buffer.getvalue().decode("utf-8"), key, title)


def _inline(svg: str, key: str, title: str) -> str:
    """An SVG document as an element of a page: no prologue, namespaces or fixed size; the page's ids and colours."""
    from markupsafe import escape

    svg = svg[svg.index("<svg") :]
    head, body = svg.split(">", 1)
    box = re.search(r'viewBox="([^"]+)"', head)
    body = re.sub(r'<g id="[^"]+"', "<g", body)
    body = re.sub(r'\bid="([^"]+)"', rf'id="{key}-\1"', body)
    body = re.sub(r"url\(#([^)]+)\)", rf"url(#{key}-\1)", body)
    body = re.sub(r'xlink:href="#([^"]+)"', rf'href="#{key}-\1"', body)
    body = re.sub(r"font-family: [^;\"]*; ", "", body)  # the family is the page's
    # matplotlib's style element would hold for the whole page.
    body = re.sub(r"<!--.*?-->\s*|<(metadata|style)\b.*?</\1>\s*", "", body, flags=re.DOTALL)
    body = re.sub(r' transform="rotate\(-0 [^"]*"', "", body)
    for name, color in INK.items():
        body = body.replace(color, f"var(--{name})")
    return (
        f'<svg class="chart" role="img" aria-label="{escape(title)}" viewBox="{box[1] if box else ""}">{body.strip()}'
    )


def _thin(points: Points) -> Points:
    """At most SHOWN_POINTS points: means of neighbours."""
    size = -(-len(points) // SHOWN_POINTS)
    if size <= 1:
        return points
    groups = (points[i : i + size] for i in range(0, len(points), size))
    return [(g[-1][0], sum(v for _, v in g) / len(g)) for g in groups]


def _running_mean(heights: Sequence[float], window: int) -> list[float]:
    half = window // 2
    parts: Iterable[Sequence[float]] = (heights[max(0, i - half) : i + half + 1] for i in range(len(heights)))
    return [sum(p) / len(p) for p in parts]


def _width(text: str) -> int:
    return sum(2 if ord(c) > 0x2E80 else 1 for c in text)


def short(text: str, limit: int = 14) -> str:
    text = " ".join(text.split())
    while _width(text) > limit:
        text = text.removesuffix("…")[:-1] + "…"
    return text
