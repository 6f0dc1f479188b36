"""The report's sentences and numbers: what came of a run, in words that people say."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeGuard

from danlu.pipeline.listing import StageView, failed_gates, run_status


def verdict(stages: Sequence[StageView]) -> list[str]:
    """What came of the run, in plain sentences, the most important one first."""
    status, done = run_status(stages), sum(s.status == "done" for s in stages)
    # A smaller copy of a model is no step of training.
    said = [_outcome([row for s in stages if s.kind != "quantize" for row in s.table])]
    if status == "done":
        said.append(f"All {len(stages)} stages are done.")
    else:
        said.insert(0, _unfinished(status, stages, done))
    gates = [g for s in stages for g in s.gates]
    failed = [str(g.get("code")) for s in stages for g in failed_gates(s)]
    warned = [str(g.get("code")) for g in gates if not g.get("passed") and g.get("warning")]
    if failed:
        said.append(f"{'These gates do' if len(failed) > 1 else 'This gate does'} not hold: {', '.join(failed)}.")
    elif gates:
        every = "Every gate holds." if status == "done" else "Every gate so far holds."
        said.append(every if not warned else f"No gate failed; a warning: {', '.join(warned)}.")
    return [s for s in said if s]


def _unfinished(status: str, stages: Sequence[StageView], done: int) -> str:
    count = f"{done} of {len(stages)} stages are done."
    at = next((s for s in stages if s.status == status), None)
    if at is None and status == "failed":
        at = next(s for s in reversed(stages) if failed_gates(s))
        return f"Stopped after stage “{at.name}”: gate {failed_gates(at)[0].get('code')} does not hold. {count}"
    if at is None:
        return f"Not finished: {count}"
    if status == "failed":
        error = str(at.manifest.get("error") or "").strip().split("\n")[0]
        return f"Stage “{at.name}” failed{f': {error}' if error else ''}. {count}"
    if status == "running":
        return f"Stage “{at.name}” is running. {count}"
    return f"Interrupted in stage “{at.name}”. {count} The same command goes on from there."


def _outcome(rows: Sequence[Mapping[str, Any]]) -> str:
    marked = [r for r in rows if mean(r, "rubric") is not None]
    if len(marked) < 2:
        return ""
    first, last = marked[0], marked[-1]
    key = "correct" if mean(first, "correct") is not None and mean(last, "correct") is not None else "rubric"
    end, begin = mean(last, key) or 0.0, mean(first, key) or 0.0
    what = "answers {} of the held-out questions correctly" if key == "correct" else "scores {} on the rubric"
    text = f"“{last.get('model')}” {what.format(number(end, True))}; “{first.get('model')}” {number(begin, True)}."
    if len(marked) > 2:
        text += " " + _step(marked[-2], last)
    return text


def _step(before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
    a, b = before["rubric"], after["rubric"]
    change = f"from {number(a['mean'], True)} to {number(b['mean'], True)}"
    names = f"from “{before.get('model')}” to “{after.get('model')}” the rubric score"
    apart = b.get("low", -1) > a.get("high", 2) or a.get("low", -1) > b.get("high", 2)
    if not apart:
        return f"{names[0].upper()}{names[1:]} goes {change}: the intervals overlap, so it may be chance."
    return f"{names[0].upper()}{names[1:]} {'rises' if b['mean'] > a['mean'] else 'falls'} {change}, beyond chance."


def number(value: float, percent: bool = False) -> str:
    """Three significant figures, thousands separated, no exponent where people can do without."""
    if not math.isfinite(value):
        return str(value)
    if percent:
        return f"{value:.1%}".replace(".0%", "%")
    if float(value).is_integer() and abs(value) < 1e15:
        return f"{int(value):,}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}" if abs(value) >= 1e-3 else f"{value:.1e}"


def duration(seconds: float) -> str:
    """Such as 12 s, 3 min 20 s or 1 h 5 min."""
    if 0 < seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60} min"


def size(count: float) -> str:
    """Bytes for people."""
    unit = "B"
    for larger in ("KiB", "MiB", "GiB"):
        if count < 1024:
            break
        count, unit = count / 1024, larger
    return f"{count:.1f} {unit}" if count < 10 and unit != "B" else f"{count:.0f} {unit}"


def visible(text: Any) -> str:
    """Control characters, which HTML forbids, as the picture of one."""
    return "".join(chr(0x2400 + ord(c)) if ord(c) < 32 and c not in "\n\t" else c for c in str(text))


def is_number(value: Any) -> TypeGuard[float]:
    """Whether a value is a number; `True` is none."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def mean(row: Mapping[str, Any], key: str) -> float | None:
    """The mean of a result row's `key`, if it has one."""
    value = row.get(key)
    return float(value["mean"]) if isinstance(value, Mapping) and is_number(value.get("mean")) else None
