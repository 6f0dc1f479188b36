"""What is compared: works, sizes, peers, their settings, and the goals.

"default" is what a peer does when nothing is said about speed. "best" are settings that were found to be its fastest on a CPU; of
several, all take the first turn and the fastest one goes on.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Literal

from benchmarks.peers import environments
from danlu.pipeline.export_check import llama_python

TRL = "TRL 1.16"
TRL_PPO = "TRL 1.12"
LLAMAFACTORY = "LLaMA-Factory 0.9.5"
TRANSFORMERS = "transformers 5.23"
LLAMA_CPP = "llama.cpp"
Setting = Literal["default", "best"]


@dataclass(frozen=True)
class Peer:
    """A peer's way of doing one work.

    Args:
        name: of the peer, or of its function.
        settings: what decides its speed; the optimizer, the schedule and the rows are the same for all.
        ours: which of danlu's own settings it is held against.
        quick: whether the quick run measures it.
        goal: the ratio to reach, if it is not that of its setting.
    """

    name: str
    setting: Setting
    settings: dict[str, Any]
    ours: str = "bfloat16"
    quick: bool = True
    goal: float | None = None


@dataclass(frozen=True)
class Work:
    """One comparison at one size.

    Args:
        ours: danlu's settings by precision.
        rows: timed rows of a window, of the full and of the quick run.
        check: rows of the steps whose losses are compared, and turns: timed windows; of the full and of the quick run.
        goals: ratios to reach, by the peer's setting.
        trials: timed windows that every setting takes; then only the fastest of a peer goes on. 0: the warm-up decides.
        tolerance: of the losses of both sides.
        compare: metrics that stand in for losses (where answers are given to both sides).
        quick: whether the quick run has it.
        listed: whether a run has it that does not ask for its size.
    """

    name: str
    size: str
    unit: str
    ours: dict[str, dict[str, Any]]
    peers: list[Peer]
    rows: tuple[int, int]
    goals: dict[Setting, float]
    check: tuple[int, int] = (8, 4)
    turns: tuple[int, int] = (3, 2)
    trials: int = 0
    tolerance: float = 0.02
    compare: tuple[str, ...] = ()
    quick: bool = True
    listed: bool = True
    extra: dict[str, Any] = field(default_factory=dict)


def command(peer: str) -> list[str] | None:
    """How a peer's side is started, if its environment is there."""
    modules = {TRL: ("trl", "trl_training"), TRL_PPO: ("trl-ppo", "trl_ppo")}
    modules |= {LLAMAFACTORY: ("llamafactory", "llamafactory_training")}
    if peer == LLAMA_CPP:
        found = llama_python()  # the one that G-EXPORT asks
        return [found, "-m", "benchmarks.peers.llama_generation"] if found is not None else None
    # TRL's environment has the release of transformers that is measured, and neither changes the other.
    environment, module = modules.get(peer, ("trl", "transformers_generation"))
    python = environments.python(environment)
    return [str(python), "-m", f"benchmarks.peers.{module}"] if python is not None else None


def how_to_make(peer: str) -> str:
    """The command that makes the environment of a peer."""
    return "make foreign" if peer == LLAMA_CPP else "python -m benchmarks peers"


GROUPED = {"train_sampling_strategy": "group_by_length"}
TRL_FAST = {"bf16": True, "gradient_checkpointing": False}
EAGER, LF_EAGER = {"attention": "eager"}, {"flash_attn": "disabled"}
LF_FAST = {"bf16": True, "disable_gradient_checkpointing": True, **GROUPED}


# Two processes with a thread each, in place of one with two, as `danlu run` and `accelerate launch` start them.
TWO = {"processes": 2}


def _size(rows: int, accumulated: int = 1) -> dict[str, Any]:
    """Rows of a process and micro-batch, and micro-batches of a process and step."""
    return {"per_device_train_batch_size": rows, "gradient_accumulation_steps": accumulated}


# Rows of whole conversations laid end to end, which attend to themselves alone.
TRL_PACKED = TRL_FAST | EAGER | {"packing": True, "max_length": 512} | _size(1)
LF_PACKED = (
    {"bf16": True, "disable_gradient_checkpointing": True, "neat_packing": True, "packed": 512} | LF_EAGER | _size(1)
)
PURE = {"weights": "bfloat16"}


def _sft_peers(size: str) -> list[Peer]:
    peers = [
        Peer(TRL, "default", {}),
        Peer(TRL, "best", TRL_PACKED),
        Peer(TRL, "best", TRL_PACKED | PURE, quick=False),
        Peer(LLAMAFACTORY, "default", {}, quick=False),
        Peer(LLAMAFACTORY, "best", LF_PACKED, quick=False),
    ]
    return [p for p in peers if size == "7M" or (p.name, p.setting) != (LLAMAFACTORY, "default")]  # it is slow


def _by_length(name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Fast padded batches: rows of like length together, as TRL and as LLaMA-Factory are told."""
    lengths: dict[str, Any] = {"length_column_name": "length"} if name != "sft" else {}
    kept = {**lengths, "remove_unused_columns": False} if lengths else {}  # TRL's trainers would drop the lengths
    return TRL_FAST | GROUPED | kept, LF_FAST | lengths


def _pair_peers(name: str) -> list[Peer]:
    trl, lf = _by_length(name)
    return [
        Peer(TRL, "default", {}),
        Peer(TRL, "best", trl | _size(4)),
        Peer(TRL, "best", trl, quick=False),
        Peer(LLAMAFACTORY, "default", {}, quick=False),
        Peer(LLAMAFACTORY, "best", lf | _size(4), quick=False),
    ]


# At 2e-4 a reward model's loss falls from 0.66 to 0.18 in two steps, and what is left then differs by 4% between TRL and
# LLaMA-Factory, too: rounding decides the signs of Adam's first steps.
GENTLE = {"check_rate": 5e-5}


def _supervised(name: str, size: str, goals: dict[Setting, float], rows: tuple[int, int], **changes: Any) -> Work:
    peers = _sft_peers(size) if name == "sft" else _pair_peers(name)
    ours = {"bfloat16": {**OURS, **changes.pop("settings", {})}}
    return Work(name, size, "tokens/s", ours, peers, rows, goals, **changes)


def _grpo() -> Work:
    whole = {"num_generations": 8, "max_completion_length": 64, "beta": 0.04, "loss_type": "grpo"}
    fast = {**whole, **TRL_FAST}
    peers = [
        Peer(TRL, "default", whole | _size(8, 8)),
        Peer(
            TRL, "best", fast | _size(64)
        ),  # faster than 4 times 16 rows, and than with transformers' continuous batching
    ]
    own = {"group_size": 8, "kl_coef": 0.04, "missing_stop_penalty": 0.0}
    settings = {"dtype": "bfloat16", "micro_tokens": 4096, "rollout": ROLLOUT, "grpo": own}
    goals: dict[Setting, float] = {"default": 4, "best": 3}
    options: dict[str, Any] = {"compare": ("score", "loss"), "extra": EPISODES, "turns": (3, 1)}
    return Work(
        "grpo",
        "7M",
        "completion tokens/s",
        {"bfloat16": settings},
        peers,
        (8, QUICK_EPISODES["grpo"] // 8),
        goals,
        **options,
    )


def _ppo() -> Work:
    peers = [
        Peer(TRL_PPO, "default", _size(8, 8)),
        Peer(TRL_PPO, "best", TRL_FAST | _size(16, 4), quick=False),  # 64 rows at once are slower
        Peer(TRL_PPO, "best", TRL_FAST | _size(32) | TWO),
    ]
    settings = {
        "dtype": "bfloat16",
        "micro_tokens": 4096,
        "rollout": ROLLOUT,
        "ppo": PPO | {"keep_graphs": True},
        **TWO,
    }
    goals: dict[Setting, float] = {"default": 5, "best": 4}
    # Each iteration draws answers of its own lengths: one says little.
    options: dict[str, Any] = {"compare": ("score",), "extra": EPISODES, "turns": (3, 1), "trials": 1}
    return Work(
        "ppo", "7M", "completion tokens/s", {"bfloat16": settings}, peers, (64, QUICK_EPISODES["ppo"]), goals, **options
    )


def _generate() -> Work:
    peers = [Peer(f"{TRANSFORMERS} generate", "default", {"method": "generate", "dtype": "float32"}, "float32")]
    for dtype in ("float32", "bfloat16"):
        sorted_rows = {"method": "generate", "dtype": dtype, "by_length": True}
        peers.append(Peer(f"{TRANSFORMERS} generate", "best", sorted_rows, dtype, quick=False))
        continuous = {"method": "generate_batch", "dtype": dtype}
        peers.append(Peer(f"{TRANSFORMERS} generate_batch", "best", continuous, dtype, quick=dtype == "float32"))
    # Both in 16 bits: F16 is llama.cpp's own, and bfloat16 danlu's.
    peers.append(Peer(LLAMA_CPP, "best", {}, "bfloat16", quick=False, goal=0.7))
    ours = {dtype: {"dtype": dtype} for dtype in ("float32", "bfloat16")}
    goals: dict[Setting, float] = {"default": 3, "best": 2.5}
    return Work("generate", "7M", "tokens/s", ours, peers, (64, 24), goals, extra={"slots": 16})


def _memory() -> Work:
    """One trunk with adapters beside four models, of which policy and critic train adapters of the same rank."""
    four = Peer(TRL_PPO, "best", TRL_FAST | _size(4, 2))
    rollout = {"batch": 8, "max_new_tokens": 16}
    ppo = {"dtype": "bfloat16", "adapter": "lora", "micro_tokens": 1024, "rollout": rollout, "ppo": PPO}
    extra = {"episodes": 8, "new": 16, "lora": 8}
    options: dict[str, Any] = {"compare": ("score",), "extra": extra, "quick": False}
    return Work("memory", "0.5B", "bytes", {"bfloat16": ppo}, [four], (8, 8), {"best": 0.4}, **options)


QUICK_TOKENS = 32  # of an answer
QUICK_EPISODES = {"grpo": 32, "ppo": 16}  # of an iteration


def shortened(work: Work) -> Work:
    """For the quick run: fewer episodes in `grpo` and `ppo`, and answers of half as many tokens."""
    if work.name not in ("grpo", "ppo"):
        return work
    episodes = QUICK_EPISODES[work.name]
    rollout = {**ROLLOUT, "batch": episodes, "max_new_tokens": QUICK_TOKENS}
    ours = {name: {**settings, "rollout": rollout} for name, settings in work.ours.items()}
    limit = {"max_completion_length": QUICK_TOKENS} if work.name == "grpo" else {}
    peers = [replace(peer, settings={**peer.settings, **limit, **_quick_size(peer, episodes)}) for peer in work.peers]
    return replace(work, ours=ours, peers=peers, extra={"episodes": episodes, "new": QUICK_TOKENS})


def _quick_size(peer: Peer, episodes: int) -> dict[str, Any]:
    """Rows of a micro-batch as before where so many are left, the rest accumulated."""
    own = episodes // peer.settings.get("processes", 1)
    rows = min(peer.settings["per_device_train_batch_size"], own)
    return _size(rows, own // rows)


def _tried() -> dict[str, list[Peer]]:
    """Settings that did not win (docs/log.md); `weights`, `attention` and `packed` are the sides', not the trainers'."""
    found: dict[str, list[Peer]] = {}
    for name in ("sft", "reward", "dpo"):
        trl, lf = _by_length(name)
        changes: list[dict[str, Any]] = [{}, {"optim": "adamw_torch"}, _size(16), _size(4)]
        peers = [Peer(TRL, "best", trl | c) for c in [*changes, PURE, EAGER, PURE | EAGER]]
        peers += [Peer(LLAMAFACTORY, "best", lf | c) for c in [*changes, LF_EAGER]]
        if name == "sft":
            free = TRL_FAST | {"padding_free": True}
            peers += [Peer(TRL, "best", free | c) for c in [*changes, _size(32), EAGER]]
            others = [
                {"optim": "adamw_torch"},
                {"max_length": 1024},
                {"max_length": 1024} | PURE,
                {"attention": "sdpa"} | PURE,
            ]
            peers += [Peer(TRL, "best", TRL_PACKED | c) for c in others]
            others = [{"optim": "adamw_torch"}, {"packed": 1024}, {"flash_attn": "sdpa"}]
            peers += [Peer(LLAMAFACTORY, "best", LF_PACKED | c) for c in others]
        timed = [p.settings for w in WORKS if w.name == name for p in w.peers]
        found[name] = [p for p in peers if p.settings not in timed]
    return found


OURS = {"dtype": "bfloat16", "tokens_per_step": 4096, "micro_tokens": 4096}
ROLLOUT = {"batch": 64, "max_new_tokens": 64}
PPO = {"epochs": 1, "minibatches": 1, "missing_stop_penalty": 0.0, "score_clip": 100.0}
EPISODES = {"episodes": 64, "new": 64}
# "online": the reference is read in every step on both sides, so that a window has all the work of an epoch.
ONLINE = {"reference": "online"}
# Without goals of its own, and not in half an hour.
UNLISTED: dict[str, Any] = {"turns": (2, 2), "quick": False, "listed": False}
GEMM_GOALS = {"7M": 0.4, "60M": 0.6}

WORKS = [
    _supervised("sft", "7M", {"default": 4, "best": 1.5}, (32, 16)),
    _supervised("reward", "7M", {"default": 5, "best": 2}, (24, 16), check=(16, 8), extra=GENTLE),
    _supervised("dpo", "7M", {"default": 5, "best": 2.5}, (12, 8), settings=ONLINE),
    _generate(),
    _grpo(),
    _ppo(),
    _supervised("sft", "60M", {"default": 4, "best": 1.3}, (16, 16), turns=(2, 2), quick=False),
    _memory(),
    *(
        _supervised(name, "60M", {}, (8, 8), **UNLISTED, **more)
        for name, more in (("reward", {}), ("dpo", {"settings": ONLINE}))
    ),
]

TRIED = _tried()
