"""The harness's own arithmetic and protocol: a benchmark that counts wrongly is worse than none."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks import core, gpu, inputs, inside, ratios, tables, works
from benchmarks.core import Measured
from benchmarks.peers import environments
from benchmarks.peers.meter import precision
from benchmarks.turns import Side, SideFailed, Sides, take_turns
from benchmarks.works import GEMM_GOALS, LLAMAFACTORY, TRANSFORMERS, TRL, WORKS, Work, command, shortened
from danlu.config import KINDS
from danlu.models import lean
from danlu.models.load import load_model
from danlu.models.starters import starter
from danlu.parsing import parse

KEYS = {"work", "size", "ours", "peer", "peer_setting", "peer_value", "unit", "ratio", "low", "high", "goal"}
IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
PRECISIONS = {"ours_precision", "peer_precision"}
FACTS = {
    "work": "sft",
    "ours_precision": "fp32",
    "peer_precision": "bf16",
    "size": "7M",
    "peer": "P",
    "peer_setting": "best",
    "unit": "tokens/s",
    "goal": 1.5,
}


def windows(*seconds: float, tokens: float = 120.0) -> list[dict[str, Any]]:
    return [{"seconds": s, "tokens": tokens} for s in seconds]


def test_a_ratio_is_taken_within_a_turn() -> None:
    # Turn by turn: 120 / 2 over 120 / 4 = 2, 120 / 3 over 120 / 12 = 4, 120 / 4 over 120 / 12 = 3.
    found = ratios.row(windows(2, 3, 4), windows(4, 12, 12), losses=([1.0], [1.0]), tolerance=0.02, **FACTS)
    assert (found["ratio"], found["low"], found["high"]) == (3.0, 2.0, 4.0)
    assert (found["ours"], found["peer_value"]) == (40.0, 10.0)
    assert set(found) == KEYS | PRECISIONS | {"loss_difference"}
    assert "| P, best | fp32, bf16 | 40 | 10 |" in tables.markdown([found])


def test_pairs_episodes_and_peaks_stand_beside_the_ratio() -> None:
    ours, peer = (Measured([1.0], windows(2, 4, 8, tokens=100), peak, "fp32") for peak in (5e8, 1.5e9))
    reward, ppo = (next(w for w in WORKS if w.name == name) for name in ("reward", "ppo"))
    pairs = core._beside(reward, ours, peer, {"pairs": 10, "tokens": 100})
    assert pairs == {"item": "pair", "ours_items": 2.5, "peer_items": 2.5, "ours_peak": 5e8, "peer_peak": 1.5e9}
    episodes = core._beside(ppo, ours, peer, {"episodes": 64})
    assert (episodes["item"], episodes["ours_items"]) == ("episode", 16.0)
    compared = ratios.row(ours.windows, peer.windows, losses=([1.0], [1.0]), tolerance=0.02, **FACTS) | episodes
    assert tables.markdown([compared]).splitlines()[2].endswith("| 16, 16 episodes | 0.50, 1.50 |")


def test_tokens_are_counted_per_side() -> None:
    found = ratios.row(windows(2), windows(2, tokens=30), losses=([1.0], [1.0]), tolerance=0.02, **FACTS)
    assert found["ratio"] == 4.0


@pytest.mark.parametrize(
    ("ours", "theirs", "difference"),
    [
        ([2.0, 1.0], [2.0, 0.8], 0.25),
        ([-0.5], [-0.4], 0.25),
        ([0.01], [0.0], 0.1),  # 0.01 of the smallest scale, 0.1
        ([1.0, 1.0], [1.0], math.inf),
        ([], [], math.inf),
    ],
)
def test_loss_difference(ours: list[float], theirs: list[float], difference: float) -> None:
    assert ratios.loss_difference(ours, theirs) == pytest.approx(difference)


@pytest.mark.parametrize(("theirs", "shown"), [([1.03], 0.03 / 1.03), ([1.0, 1.0], None)])
def test_other_losses_make_a_row_void(theirs: list[float], shown: float | None) -> None:
    found = ratios.row(windows(1), windows(2), losses=([1.0], theirs), tolerance=0.02, **FACTS)
    assert found["ratio"] is found["low"] is found["high"] is None
    assert found["loss_difference"] == (None if shown is None else pytest.approx(shown))
    assert "| void |" in tables.markdown([found])


def test_the_fastest_setting_counts() -> None:
    assert ratios.fastest([("a", windows(9, 1, 3)), ("b", windows(2, 2, 8))]) == "b"


# -- turns --------------------------------------------------------------------------------------------------------------

CHILD = """
import os, time
from benchmarks.peers.meter import run

def work(job, meter):
    meter.wait()
    meter.checked(job["losses"], "fp32")
    for i in range(job["windows"]):
        meter.wait()
        with open(job["diary"], "a") as diary:
            diary.write(f"{job['name']}{i} ")
        meter.report(tokens=i + 1, steps=1)

run(work)
"""


PACED_CHILD = """
from benchmarks.peers.meter import run

def work(job, meter):
    meter.wait()
    meter.checked([1.0], "fp32")
    for tokens in job["settings"]["tokens"]:
        meter.wait()
        meter.say(seconds=1.0, tokens=tokens, steps=1)

run(work)
"""


def side(folder: Path, name: str, **job: Any) -> Side:
    script = folder / "child.py"
    script.write_text(CHILD, "utf-8")
    told = {"name": name, "diary": str(folder / "diary"), "windows": 3, "losses": [1.0, 0.5], **job}
    return Side(name, [sys.executable, str(script)], told, folder / name)


def test_sides_take_turns(tmp_path: Path) -> None:
    with side(tmp_path, "a") as a, side(tmp_path, "b") as b:
        assert [a.check(), b.check()] == [[1.0, 0.5], [1.0, 0.5]]
        found = take_turns([a, b], 3)
        peaks = [s.next("peak")["peak"] for s in (a, b)]
    assert (tmp_path / "diary").read_text() == "a0 b0 a1 b1 a2 b2 "
    assert [[w["tokens"] for w in reports] for reports in found] == [[1, 2, 3], [1, 2, 3]]
    assert all(1e6 < peak < 1e9 for peak in peaks)


def test_children_are_kept_for_the_next_work(tmp_path: Path) -> None:
    """One process does both jobs; what was stopped in the middle of its own is not asked again."""
    script = tmp_path / "child.py"
    script.write_text(CHILD, "utf-8")
    told = {"name": "a", "diary": str(tmp_path / "diary"), "windows": 1, "losses": [1.0]}
    processes = []
    with Sides(keep=True) as children:
        for work in range(2):
            command = [sys.executable, str(script)]
            done, dropped = (children.start(f"{n}{work}", command, told, tmp_path / f"{n}{work}") for n in "ab")
            assert [side.check() for side in (done, dropped)] == [[1.0], [1.0]]
            take_turns([done], 1)
            assert done.next("peak")["peak"] > 1e6
            children.ended([done], [dropped])
            children_of = [side._children[0]._process for side in (done, dropped)]
            processes.append(tuple(child.pid for child in children_of))
            assert children_of[1].poll() is not None
    assert processes[0][0] == processes[1][0]
    assert processes[0][1] != processes[1][1]
    assert done._children[0]._process.poll() is not None


RANKED = """
import os
from benchmarks.peers.meter import run

def work(job, meter):
    meter.wait()
    rank = int(os.environ["RANK"])
    meter.checked([float(rank), float(os.environ["WORLD_SIZE"]), float(os.environ["OMP_NUM_THREADS"])], "fp32")
    meter.wait()
    meter.report(tokens=10 + rank, steps=1)

run(work)
"""


def test_ranks_of_a_side_take_their_turn_together(tmp_path: Path) -> None:
    """Tokens and peaks of both, the longer time, everything else as rank 0 says it; and none goes on before its turn."""
    script = tmp_path / "child.py"
    script.write_text(RANKED, "utf-8")
    with Side("both", [sys.executable, str(script)], {}, tmp_path / "both", processes=2) as both:
        assert both.check()[:2] == [0.0, 2.0]
        (window,) = take_turns([both], 1)[0]
        assert window["tokens"] == 21 and window["steps"] == 1
        assert both.next("peak")["peak"] > 10e6


def test_the_end_of_a_rank_ends_its_side(tmp_path: Path) -> None:
    script = tmp_path / "child.py"
    script.write_text(
        RANKED.replace("meter.report", "if rank: raise SystemExit('no memory')\n    meter.report"), "utf-8"
    )
    with Side("both", [sys.executable, str(script)], {}, tmp_path / "both", processes=2) as both:
        both.check()
        with pytest.raises(SideFailed, match=r"both: no 'seconds'(?s:.*)no memory"):
            both.go()


def test_quick_answers_are_shorter_on_both_sides() -> None:
    work = shortened(next(w for w in WORKS if w.name == "grpo"))
    assert work.extra["new"] == work.ours["bfloat16"]["rollout"]["max_new_tokens"] == 32
    assert {p.settings["max_completion_length"] for p in work.peers} == {32}
    assert work.extra["episodes"] == work.ours["bfloat16"]["rollout"]["batch"] == work.rows[1] * 8
    sizes = [(p.settings["per_device_train_batch_size"], p.settings["gradient_accumulation_steps"]) for p in work.peers]
    assert {rows * times for rows, times in sizes} == {work.extra["episodes"]}
    sft = WORKS[0]
    assert shortened(sft) is sft


def test_a_side_that_dies_says_why(tmp_path: Path) -> None:
    with side(tmp_path, "a", windows="none") as a:
        a.check()
        with pytest.raises(SideFailed, match="'str' object cannot be interpreted as an integer"):
            a.go()


# -- works, peers, tables ------------------------------------------------------------------------------------------------


def test_every_goal_has_its_work() -> None:
    goals = {(w.name, w.size, setting): goal for w in WORKS for setting, goal in w.goals.items()}
    assert goals == {
        ("sft", "7M", "default"): 4,
        ("sft", "7M", "best"): 1.5,
        ("sft", "60M", "default"): 4,
        ("sft", "60M", "best"): 1.3,
        ("reward", "7M", "default"): 5,
        ("reward", "7M", "best"): 2,
        ("dpo", "7M", "default"): 5,
        ("dpo", "7M", "best"): 2.5,
        ("grpo", "7M", "default"): 4,
        ("grpo", "7M", "best"): 3,
        ("ppo", "7M", "default"): 5,
        ("ppo", "7M", "best"): 4,
        ("generate", "7M", "default"): 3,
        ("generate", "7M", "best"): 2.5,
        ("memory", "0.5B", "best"): 0.4,
    }
    assert GEMM_GOALS == {"7M": 0.4, "60M": 0.6}


@pytest.mark.parametrize("work", WORKS, ids=lambda w: f"{w.name}-{w.size}")
def test_settings_of_a_work(work: Work) -> None:
    assert {p.setting for p in work.peers if p.quick or not work.quick} == (set(work.goals) or {"default", "best"})
    assert work.goals or not work.listed
    assert {p.ours for p in work.peers} == set(work.ours)
    kind = {"memory": "ppo"}.get(work.name, work.name)
    for settings in work.ours.values() if kind in KINDS else ():
        parse(KINDS[kind], {**settings, "max_length": inputs.MAX_LENGTH})


def test_rows_of_a_work_with_several_settings_of_a_peer() -> None:
    work = next(w for w in WORKS if (w.name, w.size) == ("sft", "7M"))
    names = {f"{p.name} {p.setting} {i}": p for i, p in enumerate(work.peers)}
    found = {"danlu bfloat16": Measured([9.0], windows(1, 1), 1e9, "mixed bf16")}
    found["gemm"] = Measured([], windows(1, 2), 1e9, "bf16")
    for index, name in enumerate(names):
        found[name] = Measured(
            [9.0], windows(2 + index, 2 + index), 1e9, "fp32" if names[name].settings == {} else "mixed bf16"
        )
    rows = core._rows(work, found, names, {"parameters": 10})
    best = {(r["peer"], r["peer_setting"]): r["ratio"] for r in rows}
    slow = {
        (p.name, p.setting): 2 + i for i, p in reversed(list(enumerate(work.peers)))
    }  # the first one is the fastest
    assert best == {**slow, ("bare bf16 products", "best"): pytest.approx(90.0)}  # 60 of 1 and of 2, over 120 and 60
    peaks = {"ours_peak", "peer_peak"}
    assert {(r["peer_setting"], r["ours_precision"], r["peer_precision"]) for r in rows} == {
        ("default", "mixed bf16", "fp32"),
        ("best", "mixed bf16", "mixed bf16"),
        ("best", "mixed bf16", "bf16"),
    }
    assert all(
        set(r) == KEYS | PRECISIONS | {"loss_difference"} | (peaks if r["work"] == "sft" else set()) for r in rows
    )
    assert json.loads(json.dumps(rows)) == rows


def test_a_best_setting_stands_beside_the_same_and_the_best_precision() -> None:
    """danlu is faster in fp32, the peer in bf16: rows of bf16 and bf16, and of fp32 and bf16; its default is left in fp32."""
    work = next(w for w in WORKS if w.name == "generate")
    default = next(p for p in work.peers if p.setting == "default")
    names = {"default": default} | {p.ours: p for p in work.peers if p.name == default.name and p.setting == "best"}
    seconds = {"danlu float32": 1, "danlu bfloat16": 2, "default": 9, "float32": 6, "bfloat16": 4}
    found = {n: Measured([1.0], windows(s), 1e9, "bf16" if "bfloat16" in n else "fp32") for n, s in seconds.items()}
    rows = core._rows(work, found, names, {})
    told = [(r["peer_setting"], r["ours_precision"], r["peer_precision"], r["ratio"]) for r in rows]
    assert told == [("default", "fp32", "fp32", 9.0), ("best", "bf16", "bf16", 2.0), ("best", "fp32", "bf16", 4.0)]


@pytest.mark.parametrize(
    ("weights", "mixed", "word"),
    [(torch.float32, False, "fp32"), (torch.float32, True, "mixed bf16"), (torch.bfloat16, True, "bf16")],
)
def test_words_of_precision(weights: torch.dtype, mixed: bool, word: str) -> None:
    assert precision(weights, mixed) == word


def test_a_peer_that_is_not_there_has_a_row_that_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DANLU_BENCH_PEERS", str(tmp_path))
    monkeypatch.setattr(works, "llama_python", lambda: None)
    peers = next(w for w in WORKS if w.name == "generate").peers
    assert [command(p.name) for p in peers] == [None] * len(peers)
    measured = [p for p in peers if p.setting == "default"]
    rows = core._unmeasured(WORKS[3], peers, measured)
    assert [(r["peer"], r["not_measured"]) for r in rows] == [
        ("transformers 5.23 generate", "no environment: `python -m benchmarks peers` makes it"),
        ("transformers 5.23 generate_batch", "no environment: `python -m benchmarks peers` makes it"),
        ("llama.cpp", "no environment: `make foreign` makes it"),
    ]
    shown = tables.markdown(rows).splitlines()
    assert shown[-1].startswith(
        "| generate | 7M | llama.cpp, best | | | | | not measured: no environment: `make foreign`"
    )
    assert {line.count("|") for line in shown} == {13}


def test_the_first_turn_chooses_among_settings() -> None:
    first = {"danlu": windows(1), "a1": windows(3), "a2": windows(2), "b": windows(9)}
    assert core._survivors(first, {"a1": ("A", "best"), "a2": ("A", "best"), "b": ("A", "default")}) == {
        "danlu",
        "a2",
        "b",
    }


@pytest.mark.parametrize(
    ("turns", "expected"),
    [
        ((1, 0, 0), {"ours": [2], "a1": [1], "a2": [3]}),  # nothing comes after the warm-up
        ((1, 0, 2), {"ours": [2, 2], "a2": [3, 3]}),
        ((1, 1, 1), {"ours": [2, 2], "a1": [9, 9]}),  # fast from its second window on
        ((1, 1, 0), {"ours": [2], "a1": [9], "a2": [3]}),
    ],
)
def test_trials_choose_among_settings(
    turns: tuple[int, int, int], expected: dict[str, list[int]], tmp_path: Path
) -> None:
    script = tmp_path / "child.py"
    script.write_text(PACED_CHILD, "utf-8")
    paces = {"ours": [2] * 3, "a1": [1, 9, 9], "a2": [3] * 3}
    command = [sys.executable, str(script)]
    sides = [(name, command, {"tokens": paces[name][: sum(turns)]}) for name in paces]
    labels = {"a1": ("A", "best"), "a2": ("A", "best")}
    with Sides(keep=False) as children:
        found = core._measure(children, sides, {"work": "ppo"}, tmp_path, turns, labels)
    assert {name: [w["tokens"] for w in m.windows] for name, m in found.items()} == expected


def test_parameters_and_shapes_are_those_of_the_model() -> None:
    found = core._gemm("7M", 8192)
    model = starter(8192, **inputs.SIZES["7M"], seed=0, ids={"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2})
    layer = model.model.layers[0]
    shapes = sorted(list(m.weight.shape) for m in layer.modules() if isinstance(m, torch.nn.Linear))
    assert sorted(map(list, found["shapes"])) == shapes
    assert found["parameters"] == sum(p.numel() for p in model.parameters())
    assert round(found["parameters"] / 1e6) == 7


def test_write_section_leaves_the_others(tmp_path: Path) -> None:
    file = tmp_path / "benchmarks.md"
    file.write_text("# Benchmarks\n\n## Core\n\nold\n\n## Data\n\nkept\n", "utf-8")
    tables.write_section(file, "Core", "new\n\n| a |")
    tables.write_section(file, "GPU", "last")
    text = file.read_text("utf-8")
    assert [line for line in text.splitlines() if line.startswith("#")] == [
        "# Benchmarks",
        "## Core",
        "## Data",
        "## GPU",
    ]
    assert "old" not in text and "new\n\n| a |\n\n## Data\n\nkept\n\n## GPU" in text


def test_an_environment_of_other_versions_does_not_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DANLU_BENCH_PEERS", str(tmp_path))
    assert environments.python("trl") is None
    (tmp_path / "trl").mkdir()
    stamp = tmp_path / "trl" / "installed"
    stamp.write_text(environments._digest("trl"), "utf-8")
    assert environments.python("trl") == tmp_path / "trl" / "bin" / "python"
    stamp.write_text(environments._digest("llamafactory"), "utf-8")
    assert environments.python("trl") is None


@pytest.mark.parametrize(("name", "peer"), [("trl", "trl==1.16.0"), ("trl-ppo", "trl==1.12.0")])
def test_pins_are_exact(name: str, peer: str) -> None:
    pins = (Path(environments.__file__).parent / f"{name}.txt").read_text("utf-8").split()
    assert {peer, "torch==2.13.0"} <= set(pins)
    assert all(pin.count("==") == 1 for pin in pins)
    assert name != "trl" or f"{TRANSFORMERS.replace(' ', '==')}.0" in pins
    assert TRL.endswith("1.16") and LLAMAFACTORY.endswith("0.9.5")


def test_the_command_line_names_its_parts() -> None:
    command = [sys.executable, "-m", "benchmarks", "--help"]
    shown = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(core.__file__).parents[1])
    assert (
        "{core,data,seeds,learning,teach,small,families,vocabulary,gpu,peers,settings,profile,compile}" in shown.stdout
    )


# -- inside -------------------------------------------------------------------------------------------------------------


def test_what_is_compiled_is_the_layer() -> None:
    """The plain operations around a layer's attention, results and gradients, beside the functions that they stand in for."""
    model = starter(64, **{**inputs.SIZES["7M"], "hidden_size": 40, "layers": 1}, seed=0, ids=dict.fromkeys(IDS, 0))
    layer, eps, none = model.model.layers[0], 1e-6, None
    attention, feed_forward = layer.self_attn, layer.mlp
    weights = [getattr(attention, n).weight for n in lean.ATTENTION]
    gate, up, down = (getattr(feed_forward, n).weight for n in lean.FEED_FORWARD)
    generator = torch.Generator().manual_seed(0)
    x, mixed = (torch.randn(7, 40, generator=generator, requires_grad=True) for _ in range(2))
    angles = torch.randn(7, attention.head_dim // 2, generator=generator).repeat(1, 2)
    norm, last = layer.input_layernorm.weight, [angles.cos(), angles.sin(), attention.head_dim, torch.float32]
    inner = (weights[3], none, norm, eps, gate, up, none, none, down, none, torch.float32)
    found = []
    for before, after in ((inside._before, inside._after), (lean._Before.apply, lean._After.apply)):
        out = [*before(x, norm, eps, *weights[:3], none, none, none, *last), after(x, mixed, *inner)]
        total = sum((o * torch.arange(o.numel()).view(o.shape).cos()).sum() for o in out)
        found.append([*out, *torch.autograd.grad(total, [x, mixed, norm, *weights, gate, up, down])])
    assert len(found[0]) == 14
    for plain, own in zip(*found, strict=True):
        torch.testing.assert_close(plain, own, rtol=1e-4, atol=1e-5)


def test_a_profile_knows_who_called_and_what_it_does() -> None:
    layers = SimpleNamespace(name="_AfterBackward", cpu_parent=None)
    product = SimpleNamespace(name="aten::mm", cpu_parent=layers)
    step = SimpleNamespace(name="Optimizer.step#AdamW.step", cpu_parent=None)
    average = SimpleNamespace(name="aten::_foreach_lerp_", cpu_parent=step)
    events = (product, average, layers, SimpleNamespace(name="aten::copy_", cpu_parent=None))
    assert [(inside._part(e), inside._kind(e)) for e in events] == [
        ("layers", "products"),
        ("optimizer", "passes over elements"),
        ("layers", "Python"),
        ("other", "copies"),
    ]


# -- inputs and the GPU benchmark -----------------------------------------------------------------------------------------


def test_inputs_give_both_sides_the_same_tokens(
    shared_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inputs, "ROWS", 60)
    monkeypatch.setattr(inputs, "VOCABULARY", 600)
    monkeypatch.setitem(inputs.SIZES, "7M", {**inputs.SIZES["7M"], "hidden_size": 40, "layers": 2})
    found = inputs.prepare(shared_data, tmp_path)
    file = Path(found.comparisons.write(tmp_path / "rows.jsonl", 2, 5))
    rows = [json.loads(line) for line in file.read_text("utf-8").splitlines()]
    ids = json.loads(Path(f"{file}.ids.json").read_text("utf-8"))
    for row, given in zip(rows, ids, strict=True):
        assert found.template.encode_prompt(row["prompt"]) == given["prompt"]
        assert found.tokenizer.decode(given["chosen"]).startswith(row["chosen"][0]["content"])
        assert given["chosen"][-1] == found.tokenizer.eos_token_id
    labelled = found.conversations.ids[0]
    assert [i for i in labelled["labels"] if i != -100] == labelled["input_ids"][labelled["labels"].count(-100) :]

    model = load_model(found.models("7M") / "stopping")
    prompts = [r["prompt"] for r in found.prompts.ids[:16]]
    with torch.no_grad():
        last = torch.stack([model(torch.tensor([p])).logits[0, -1] for p in prompts]).softmax(-1)
    assert float(last[:, found.tokenizer.eos_token_id].mean()) == pytest.approx(1 / inputs.MEAN_ANSWER, rel=0.2)


@pytest.mark.parametrize("size", ["1B", "7B"])
def test_shapes_of_the_gpu_benchmark(size: str, tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(vocab_size=32_000, **gpu.SHAPES[size]))
    place = gpu.Place("cpu", tmp_path, False, 1.0)
    linear = sum(m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Linear))
    assert gpu._parameters(size, place) == linear
    assert round(linear / 1e9) == int(size[0])


@pytest.mark.slow
def test_the_gpu_benchmark_runs_on_tiny_models() -> None:
    found = gpu.measure(tiny=True)
    assert {r["part"] for r in found["rows"]} == {"correct", "train", "decode", "packed", "families"}
    assert not [r for r in found["rows"] if isinstance(r["value"], str)]
    assert all(r["share"] < 1 for r in found["rows"] if r["part"] == "correct")
