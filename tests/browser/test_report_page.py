"""The report's part on the health of a stage in a real browser. `pytest -m browser`; DANLU_SCREENSHOTS=folder keeps pictures."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import chromium
import pytest
from fake_run import write_run

from danlu.pipeline.report import write_report

pytestmark = pytest.mark.browser

SIZES = [(1280, False), (1280, True), (390, False)]
# Of every chart: what it says of itself, and every text that is outside of the page, or lies on another one.
CHARTS = """
[...document.querySelectorAll('.health figure')].map(figure => {
  const svg = figure.querySelector('svg');
  const texts = [...svg.querySelectorAll('text')].map(t => [t.textContent.trim(), t.getBoundingClientRect()]);
  const apart = (a, b) => a.right <= b.left || b.right <= a.left || a.bottom <= b.top || b.bottom <= a.top;
  return {
    title: figure.querySelector('b').innerText,
    label: svg.getAttribute('aria-label'),
    keys: [...figure.querySelectorAll('.key')].map(k => k.innerText.trim()),
    texts: texts.map(t => t[0]),
    width: svg.getBoundingClientRect().width,
    size: Math.min(...texts.map(t => t[1].height)),
    outside: texts.filter(t => t[1].left < 0 || t[1].right > innerWidth).map(t => t[0]),
    overlapping: texts.filter((a, i) => texts.some((b, j) => i < j && !apart(a[1], b[1]))).map(t => t[0]),
  };
})
"""
WIDER = """
[...document.querySelectorAll('body *')].filter(e => e.getBoundingClientRect().right > innerWidth + 1 && !e.closest('.scroll'))
  .map(e => e.outerHTML.slice(0, 120))
"""


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of a run with everything that a health page can show: an ensemble, gold, PTX, a finding with a long text."""
    run = write_run(tmp_path_factory.mktemp("runs") / "town")
    path = run / "05-ppo" / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    for row in rows:
        held = {"eval_gold": 0.5 + row["step"] / 200, "eval_disagreement": 0.31}
        rolled = {
            "disagreement": 0.3,
            "reward_total": 0.4,
            "score_raw": 0.5,
            "ptx_share": 0.3,
            "approx_kl": 3e-5,
            "kl_coef": 0.05,
        }
        row |= held if "eval_score" in row else {k: v * (1 + row["step"] / 50) for k, v in rolled.items()}
    path.write_text("".join(json.dumps(r) + "\n" for r in rows), "utf-8")
    manifest = run / "05-ppo" / "manifest.json"
    known = json.loads(manifest.read_text("utf-8"))
    known["facts"] = {
        **(known.get("facts") or {}),
        "start": {"eval_score": 0.1, "eval_length": 14.0, "eval_stop_rate": 0.98},
    }
    manifest.write_text(json.dumps(known), "utf-8")
    with (run / "05-ppo" / "health.jsonl").open("a", encoding="utf-8") as out:
        long = {
            "code": "P-REWARD-HACK",
            "severity": "error",
            "action": "stop",
            "step": 50,
            "cause": "x" * 300,
            "change": "raise kl_coef",
        }
        out.write(
            json.dumps({**long, "seen": "the held-out score fell " * 20, "done": "the best weights are back"}) + "\n"
        )
    return write_report(run)


@pytest.fixture(scope="module")
def page(report: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[chromium.Page]:
    command = chromium.find()
    if command is None or sys.platform == "win32":
        pytest.skip("no chromium here")
    browser = chromium.Chromium(command, tmp_path_factory.mktemp("profile"))
    page = browser.open(report.resolve().as_uri())
    yield page
    assert page.faults() == []
    browser.close()


@pytest.mark.parametrize(("width", "dark"), SIZES)
def test_nothing_is_wider_than_the_page(page: chromium.Page, width: int, dark: bool) -> None:
    page.look(width=width, height=900, dark=dark, mobile=width < 600)
    picture(page, f"report-{width}{'-dark' if dark else ''}")
    assert page.run("document.documentElement.scrollWidth <= innerWidth")
    assert page.run(WIDER) == []


@pytest.mark.parametrize("width", [1280, 390])
def test_charts_say_what_they_are(page: chromium.Page, width: int) -> None:
    page.look(width=width, height=900, mobile=width < 600)
    charts: list[dict[str, Any]] = page.run(CHARTS)
    assert len(charts) >= 18
    for chart in charts:
        said = (width, chart["title"], chart)
        assert chart["label"] == chart["title"] and chart["title"], said
        assert chart["keys"] and all(any(c.isdigit() for c in key) for key in chart["keys"]), said
        assert "iteration" in chart["texts"] and len(chart["texts"]) >= 5, said
        heights = chart["texts"][chart["texts"].index("iteration") + 1 :]  # no two ticks of the y axis have one name
        assert len(set(heights)) == len(heights) >= 2, said
        assert chart["outside"] == [] and chart["overlapping"] == [], said
        assert chart["width"] > 250 and chart["size"] >= 8, said


def test_charts_of_a_stage_have_one_size_and_one_axis(page: chromium.Page) -> None:
    page.look(width=1280, height=900)
    charts = page.run(CHARTS)
    assert len({round(c["width"]) for c in charts}) == 1
    assert len({tuple(c["texts"][: c["texts"].index("iteration")]) for c in charts}) == 1
    tops = page.run(
        "[...document.querySelectorAll('.health .charts')].map(g => [...g.querySelectorAll('svg')]"
        ".map(s => Math.round(s.getBoundingClientRect().top)))"
    )
    for row in tops:  # three beside one another begin at one height, however long their legends are
        assert all(len(set(row[i : i + 3])) == 1 for i in range(0, len(row), 3)), row


def test_every_group_says_what_to_look_for(page: chromium.Page) -> None:
    page.look(width=1280, height=900)
    groups = page.run(
        "[...document.querySelectorAll('.health .charts')].map(g => g.previousElementSibling)"
        ".map(before => [before.className, before.innerText])"
    )
    assert len(groups) == 7 and all("look-for" in name and len(text) > 40 for name, text in groups)
    assert page.run("document.querySelector('.health h4').innerText") == "Health"


def picture(page: chromium.Page, name: str) -> None:
    if folder := os.environ.get("DANLU_SCREENSHOTS"):
        Path(folder).mkdir(parents=True, exist_ok=True)
        page.run("document.querySelector('.health').scrollIntoView()")
        page.screenshot(Path(folder) / f"{name}.png")
