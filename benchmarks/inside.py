"""Where the time of SFT goes, and what torch.compile would make of it and of generation; `python -m benchmarks profile|compile`.

Both run danlu's side of `benchmarks/core.py` in this process. A profile sorts every operation by the part of the model that called
it and by what it does. Compiled are the two functions around the attention of a layer, as plain operations with autograd's own
backward pass, with dynamic shapes; the attention and the head stay what they are.
"""

from __future__ import annotations

import contextlib
import os
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from benchmarks import danlu_side
from benchmarks.core import default_data_root, job_of
from benchmarks.inputs import SIZES, prepare
from benchmarks.works import WORKS, Work
from danlu.models import lean

WINDOWS = 5
# Of operations by the nearest of these that called them.
PARTS = {
    "_Before": "layers",
    "_After": "layers",
    "_BlockAttention": "attention",
    "scaled_dot_product": "attention",
    "_WeightedNll": "head and loss",
    "Optimizer.step": "optimizer",
    "foreach_norm": "clipping",
}
KINDS = {
    "products": ("mm", "bmm", "addmm", "baddbmm", "linear", "mkldnn_linear", "_linear_pointwise"),
    "copies": (
        "copy_",
        "_to_copy",
        "to",
        "clone",
        "cat",
        "index_select",
        "index_copy_",
        "index_add_",
        "fill_",
        "zero_",
        "empty",
    ),
}


class Clock:
    """Stands in for a child's meter: no turns to wait for; seconds of CPU time of each window."""

    def __init__(
        self, windows: int, on_first: Callable[[], None] = lambda: None, on_last: Callable[[], None] = lambda: None
    ):
        self.windows, self.on_first, self.on_last = windows, on_first, on_last
        self.cpu: list[float] = []
        self.wall: list[float] = []
        self.tokens = 0.0
        self.losses: list[float] = []
        self._begun = (0.0, 0.0)
        self._checked = False

    def checked(self, losses: Sequence[float], precision: str) -> None:
        self.losses, self._checked = list(losses), True

    def wait(self) -> None:
        if self._checked and len(self.cpu) == 1:
            self.on_first()
        self._begun = (time.process_time(), time.perf_counter())

    def report(self, **facts: Any) -> None:
        self.cpu.append(time.process_time() - self._begun[0])
        self.wall.append(time.perf_counter() - self._begun[1])
        self.tokens = facts["tokens"]
        if len(self.cpu) == self.windows:
            self.on_last()


def _work(name: str, size: str) -> Work:
    work = next(w for w in WORKS if w.name == name)
    return replace(next((w for w in WORKS if (w.name, w.size) == (name, size)), work), size=size)


@contextlib.contextmanager
def _jobs(data_root: Path | None) -> Iterator[Callable[[str, str], dict[str, Any]]]:
    """Gives jobs by work and size; everyone has a folder of its own."""
    with tempfile.TemporaryDirectory(prefix="danlu-inside-") as root:
        inputs, made = prepare(data_root or default_data_root(), Path(root)), iter(range(1000))

        def job(name: str, size: str) -> dict[str, Any]:
            work, folder = _work(name, size), Path(root) / str(next(made))
            folder.mkdir()
            found = job_of(work, inputs, folder, (work.check[0], work.rows[0]), WINDOWS)
            return found | {"folder": str(folder), "settings": work.ours["bfloat16"]}

        yield job


# -- profile --------------------------------------------------------------------------------------------------------------


def profiled(*, size: str, data_root: Path | None = None) -> list[dict[str, Any]]:
    """Profiles SFT after a window to warm up, prints a table of parts and kinds and returns its rows."""
    with _jobs(data_root) as job:
        told = job("sft", size)
        watch = profile(activities=[ProfilerActivity.CPU])
        clock = Clock(WINDOWS, watch.start, watch.stop)
        danlu_side.work(told, clock)  # type: ignore[arg-type]
    whole = sum(clock.wall[1:]) * 1e6
    spent: dict[tuple[str, str], float] = defaultdict(float)
    for event in watch.events():
        if event.cpu_time_total and event.device_type == torch.autograd.DeviceType.CPU:
            spent[_part(event), _kind(event)] += event.self_cpu_time_total
    spent["outside of operations", "Python"] = max(0.0, whole - sum(spent.values()))
    per_parameter, bare = 6 * clock.tokens * (WINDOWS - 1), _bare_rate(told)
    used = per_parameter * told["parameters"] / (whole / 1e6)
    in_layers = per_parameter * SIZES[size]["layers"] * sum(n * k for n, k in told["shapes"])
    in_products = in_layers / (spent["layers", "products"] / 1e6)
    rows = [
        {"part": part, "kind": kind, "share": time / whole, "seconds": time / 1e6}
        for (part, kind), time in sorted(spent.items(), key=lambda item: -item[1])
    ]
    print("| part | kind | share of the time |\n|---|---|---|")
    for row in rows:
        if row["share"] >= 0.005:
            print(f"| {row['part']} | {row['kind']} | {row['share']:.1%} |")
    print(
        f"\n{used:.3g} FLOP/s of {bare:.3g} bare: {used / bare:.0%}; the layers' products alone: {in_products / bare:.0%}"
    )
    return rows


def _bare_rate(job: dict[str, Any]) -> float:
    clock = Clock(3)
    danlu_side.work({**job, "work": "gemm", "windows": 3}, clock)  # type: ignore[arg-type]
    return clock.tokens / statistics.median(clock.wall)


def _part(event: Any) -> str:
    while event is not None:
        for name, part in PARTS.items():
            if name in event.name:
                return part
        event = event.cpu_parent
    return "other"


def _kind(event: Any) -> str:
    name = event.name.removeprefix("aten::").removeprefix("mkldnn::")
    if event.name.startswith(("aten::", "mkldnn::")):
        return next((kind for kind, names in KINDS.items() if name in names), "passes over elements")
    return "Python"


# -- torch.compile --------------------------------------------------------------------------------------------------------


def _normed(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    exact = x.float()
    return (exact * (exact.square().mean(-1, keepdim=True) + eps).rsqrt() * weight).to(dtype)


def _turned(rows: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = rows.shape[2] // 2
    cos, sin = cos[:, None, :half], sin[:, None, :half]
    exact = rows.to(cos.dtype)
    low, high = exact[..., :half], exact[..., half:]
    return torch.cat([low * cos - high * sin, high * cos + low * sin], -1)


def _before(x, norm, eps, w_q, w_k, w_v, b_q, b_k, b_v, cos, sin, width, dtype):  # type: ignore[no-untyped-def]
    normed = _normed(x, norm, eps, dtype)
    query, key, value = ((normed @ w.to(dtype).T).view(len(x), -1, width) for w in (w_q, w_k, w_v))
    return _turned(query, cos, sin), _turned(key, cos, sin), value


def _after(x, mixed, w_o, b_o, norm, eps, w_gate, w_up, b_gate, b_up, w_down, b_down, dtype):  # type: ignore[no-untyped-def]
    middle = x + mixed.to(dtype) @ w_o.to(dtype).T
    normed = _normed(middle, norm, eps, dtype)
    active = torch.nn.functional.silu(normed @ w_gate.to(dtype).T) * (normed @ w_up.to(dtype).T)
    return middle + active @ w_down.to(dtype).T


class _Compiled:
    """In place of an autograd function."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.apply = torch.compile(function, dynamic=True)


@contextlib.contextmanager
def _training() -> Iterator[None]:
    with mock.patch.object(lean, "_Before", _Compiled(_before)), mock.patch.object(lean, "_After", _Compiled(_after)):
        yield


@contextlib.contextmanager
def _decoding() -> Iterator[None]:
    """Norms, rotations and the gated product of a layer of generation; its products stay packed."""
    options = {"dynamic": True}

    def normed(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> tuple[Tensor, None]:
        return norm(x, weight, eps, dtype), None

    norm, turned = torch.compile(_normed, **options), torch.compile(_turned, **options)
    with mock.patch.object(lean, "_norm", normed), mock.patch.object(lean, "_rotate", turned):
        yield


@contextlib.contextmanager
def _decoding_whole() -> Iterator[None]:
    """A layer of generation around its attention, products and all, whose weights are not packed then."""
    before, after = torch.compile(_before, dynamic=True), torch.compile(_after, dynamic=True)

    def generate(layer: Any, x: Tensor, plan: Any, cos: Tensor, sin: Tensor) -> Tensor:
        attention, feed_forward = layer.self_attn, layer.mlp
        first, second = layer.input_layernorm, layer.post_attention_layernorm
        weights = [getattr(attention, n).weight for n in lean.ATTENTION]
        query, key, value = before(
            x,
            first.weight,
            first.variance_epsilon,
            *weights[:3],
            None,
            None,
            None,
            cos[0],
            sin[0],
            attention.head_dim,
            x.dtype,
        )
        parts = (p.transpose(0, 1) for p in (query, key, value))
        mixed = plan.attend(attention.layer_idx, *parts, attention.scaling, window=None)
        gate, up, down = (getattr(feed_forward, n).weight for n in lean.FEED_FORWARD)
        out: Tensor = after(
            x,
            mixed.flatten(1),
            weights[3],
            None,
            second.weight,
            second.variance_epsilon,
            gate,
            up,
            None,
            None,
            down,
            None,
            x.dtype,
        )
        return out

    with mock.patch.object(lean, "_generate", generate):
        yield


WAYS: dict[str, dict[str, Callable[[], contextlib.AbstractContextManager[None]]]] = {
    "sft": {"as it is": contextlib.nullcontext, "layers compiled": _training},
    "generate": {
        "as it is": contextlib.nullcontext,
        "passes compiled": _decoding,
        "layers compiled": _decoding_whole,
    },
}


def compiled(*, sizes: Sequence[str], only: Sequence[str] = (), data_root: Path | None = None) -> list[dict[str, Any]]:
    """Measures works as they are and compiled, one after the other and once more as they are; returns rows and prints a table."""
    rows: list[dict[str, Any]] = []
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # read when the first function is compiled
    with _jobs(data_root) as job:
        for size in sizes:
            for name in only or WAYS:
                for way, context in [*WAYS[name].items(), ("as it is, again", contextlib.nullcontext)]:
                    rows.append({"work": name, "size": size, "way": way, **_timed(job(name, size), context)})
                    print(f"{name} {size} {way}: {rows[-1]['rate']:,.0f}", file=sys.stderr, flush=True)
    print(
        "| work | size | way | tokens / CPU second | CPU seconds to begin | loss difference |\n|---|---|---|---|---|---|"
    )
    for r in rows:
        same = next(o for o in rows if (o["work"], o["size"]) == (r["work"], r["size"]))
        difference = max(abs(a - b) for a, b in zip(r["losses"], same["losses"], strict=True))
        print(f"| {r['work']} | {r['size']} | {r['way']} | {r['rate']:,.0f} | {r['begin']:.0f} | {difference:.1e} |")
    return rows


def _cpu_with_children() -> float:
    """Of this process and of those that it has waited for: the compiler."""
    return sum(os.times()[:4])


def _timed(job: dict[str, Any], context: Callable[[], contextlib.AbstractContextManager[None]]) -> dict[str, Any]:
    clock, begun = Clock(WINDOWS), _cpu_with_children()
    torch.compiler.reset()
    with context():
        danlu_side.work(job, clock)  # type: ignore[arg-type]
    begin = _cpu_with_children() - begun - sum(clock.cpu[1:])
    return {"rate": clock.tokens / min(clock.cpu[1:]), "begin": begin, "losses": clock.losses, "windows": clock.cpu}
