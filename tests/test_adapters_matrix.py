"""Families x adapters: eight rows are learnt to near zero, the stop token comes, and saved == loaded == merged.

`make matrix` runs the whole product and writes docs/adapters.json, of which docs/adapters.md has its table.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, make
from test_chatglm_training import EOP, GMASK, SOP
from test_chatglm_training import make as make_chatglm
from torch import Tensor

from danlu.config import SftSettings
from danlu.exceptions import ModelError
from danlu.generation.engine import LocalEngine
from danlu.generation.protocol import Request, SamplingParams, generate
from danlu.models.adapter_files import load_adapted, save_adapter
from danlu.models.adapters import adapter_roles, freeze_parts, targets_of
from danlu.models.load import load_model, save_model
from danlu.models.merging import difference
from danlu.models.roles import AdapterRoles, SeparateModels
from danlu.models.root import RootModel
from danlu.training.compute import Compute
from danlu.training.optim import optimizer_of, set_rate
from danlu.training.rank_allocation import allocation_of
from danlu.training.step import accumulate, apply, language_loss
from danlu.tree import TreeBatch, conversation, forest

STOP, NEAR_ZERO = 1, 0.05
# Eight prompts of two tokens with answers of two and the stop token; first tokens differ.
ROWS = [[10 + n, 20 + 3 * n % 17, 5 + (7 * n) % 50, 5 + (11 * n + 3) % 50, STOP] for n in range(8)]
# ChatGLM's prompts end with what says that an answer follows; its first generation makes positions and masks of that.
CHATGLM_ROWS = [[10 + n, GMASK, SOP, 20 + (7 * n) % 40, 20 + (11 * n + 3) % 40, EOP] for n in range(8)]
CHATGLM = {"chatglm": "first", "chatglm2": "later"}
# kind: (learning rate, settings)
KINDS: dict[str, tuple[float, dict[str, Any]]] = {
    "full": (3e-3, {}),
    "freeze": (1e-2, {"freeze": {"layers": 2, "head": False}}),
    "lora": (2e-2, {}),
    "rslora": (1e-2, {}),
    "dora": (2e-2, {}),
    "adalora": (3e-2, {"adalora": {"initial_r": 12, "target_r": 8, "orthogonality": 0.1}, "lora": {"alpha": 96}}),
    "qlora": (2e-2, {"base_bits": 8}),
    "ia3": (1e-1, {}),
    "ptuning": (3e-2, {"prefix": {"tokens": 16}}),
    # As many as the positions of these models leave: 40 embeddings cannot say all eight answers to some random trunks (GPT-J,
    # Falcon), at whatever rate and however long.
    "prompt": (1e-1, {"prefix": {"tokens": 56}}),
}
STEPS = {"ptuning": 400, "prompt": 400}  # others: 300
# The first generation of ChatGLM reads embeddings in front of a text through layers that add little to twice what they were given:
# with random weights they are hardly heard (the loss falls from 23 to 11 and stays), and keys and values take three times as long.
UNHEARD = [("chatglm", "prompt")]
# Under ALiBi what stands before a text is far away for most heads: embeddings there take longer.
LONGER = {("chatglm", "ptuning"): (1e-1, 1200)}  # rate, steps
LONGER |= {(family, "prompt"): (1e-1, 1200) for family in ("falcon_alibi", "falcon_alibi_groups")}
QUICK = [("llama", "full"), ("llama", "freeze")]
WHOLE = [(f, k) for f in (*FAMILIES, *CHATGLM) for k in KINDS if (f, k) not in UNHEARD]


@dataclass
class Cell:
    """What a family and a kind came to."""

    loss: float
    steps: int
    stops: int
    difference: float

    @property
    def good(self) -> bool:
        return self.loss < NEAR_ZERO and self.stops == len(ROWS) and self.difference < 1e-4


def start(family: str) -> Any:
    """A random model whose head can be sure: the logits of a frozen head with small rows are bounded, and so is the loss.

    The head is never the embedding here: that would grow with it, and drown what layers, prefixes and prompts can say.
    """
    # Gemma 2's caps of the tests elsewhere bound the logits too tightly for a loss near zero; these are the published ones.
    caps: dict[str, Any] = (
        {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0} if family == "gemma2" else {}
    )
    if family in CHATGLM:
        model = make_chatglm(CHATGLM[family])
    else:
        model = make(family, tie_word_embeddings=False, **caps)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(8.0)
    return model


def cell(family: str, kind: str, folder: Path) -> Cell:
    """Trains, generates, saves, loads and merges."""
    rate, options = KINDS[kind]
    rate, steps = LONGER.get((family, kind), (rate, STEPS.get(kind, 300)))
    base = save_model(start(family), None, folder / "base")
    model = load_model(base)
    if (
        kind == "ia3"
    ):  # a random model's eight rows are too much for its three vectors a layer: here every linear layer has one
        options = {"lora": {"target": targets_of(model, "auto")}}
    settings = SftSettings(adapter=kind, **options)  # type: ignore[arg-type]
    roles: Any
    if settings.adapted:
        roles = adapter_roles(model, ["policy"], settings, updates=steps, seed=1)
    else:
        roles = SeparateModels({"policy": model}, ["policy"])
        if kind == "freeze":
            freeze_parts(model, settings.freeze)
    root = RootModel(roles).train()
    optimizer = optimizer_of(root, rate, settings)
    ranks = allocation_of(root, steps)
    if ranks is not None:
        ranks.watch({"optimizer": optimizer})
    rows = CHATGLM_ROWS if family in CHATGLM else ROWS
    tree = TreeBatch.of(forest(conversation(ids, [0.0] * (len(ids) - 3) + [1.0] * 3) for ids in rows))
    compute, loss, step = Compute("cpu", "float32", 1), float("inf"), 0
    for step in range(1, steps + 1):
        set_rate(optimizer, rate * min(1.0, step / 10) * (1 - step / (steps + 1)))
        loss = accumulate(root, "policy", [(tree, 24.0)], language_loss, compute)["loss"]
        if loss < NEAR_ZERO / 5 and kind != "adalora":
            break  # before another step at a high rate leads away again
        apply(optimizer, list(root.parameters()), 1.0)
    root.eval()
    with torch.no_grad():
        loss = float(root(tree, "policy", lambda out: language_loss(out, 24.0))[0])
    trained = _logits(roles, tree)
    scale = max(1.0, float(trained.abs().max()))
    if not settings.adapted:
        save_model(model, None, folder / "model")
        again = load_model(folder / "model")
        off = difference(_logits(_one(again), tree), trained)[0]
        return Cell(loss, step, _stops(again, rows), off / scale)
    if ranks is not None:
        ranks.finish()
        trained = _logits(roles, tree)
    save_adapter(roles, "policy", folder / "adapter", None)
    beside, whole = load_adapted(folder / "adapter", dense=False), load_model(folder / "adapter")
    off = max(difference(_logits(_one(m), tree), trained)[0] for m in (beside, whole))
    if isinstance(roles, AdapterRoles) and roles.mergeable:
        plain = start(family)
        plain.load_state_dict(roles.merged("policy"), strict=False)
        off = max(off, difference(_logits(_one(plain), tree), trained)[0])
    return Cell(loss, step, _stops(beside, rows), off / scale)


def _one(model: Any) -> SeparateModels:
    return SeparateModels({"policy": model}, [])


@torch.no_grad()
def _logits(roles: Any, tree: TreeBatch) -> Tensor:
    found: Tensor = RootModel(roles).eval()(tree, "policy", lambda out: out.logits(torch.arange(tree.tokens)))
    return found


def _stops(model: Any, rows: list[list[int]]) -> int:
    """Of the prompts, how many are answered with their answer and the stop token."""
    params = SamplingParams(max_new_tokens=6, temperature=0.0, stop_ids=frozenset([rows[0][-1]]))
    found = generate(LocalEngine(model, None), [Request(ids[:-3], params) for ids in rows])
    return sum(list(done.ids) == ids[-3:] for done, ids in zip(found, rows, strict=True))


def _needs(kind: str) -> None:
    if kind in ("ptuning", "prompt"):
        pytest.importorskip("danlu.models.prefix")


@pytest.mark.parametrize(("family", "kind"), QUICK, ids=lambda x: x)
def test_eight_rows_are_learnt(family: str, kind: str, tmp_path: Path) -> None:
    _needs(kind)
    found = cell(family, kind, tmp_path)
    assert found.good, found


@pytest.mark.slow
@pytest.mark.parametrize(("family", "kind"), WHOLE, ids=lambda x: x)
def test_the_whole_matrix(family: str, kind: str, tmp_path: Path) -> None:
    _needs(kind)
    try:
        found = cell(family, kind, tmp_path)
    except ModelError as error:
        _store(family, kind, {"refused": error.message})
        assert "int8" in error.message or "linear layers" in error.message, error
        return
    _store(family, kind, {"loss": round(found.loss, 4), "steps": found.steps, "stops": found.stops, "good": found.good})
    assert found.good, found


def _store(family: str, kind: str, row: dict[str, Any]) -> None:
    """Into the file that `DANLU_MATRIX` names, if it names one (`make matrix`)."""
    if "DANLU_MATRIX" not in os.environ:
        return
    path = Path(os.environ["DANLU_MATRIX"])
    table: dict[str, dict[str, Any]] = json.loads(path.read_text("utf-8")) if path.is_file() else {}
    table.setdefault(family, {})[kind] = row
    path.write_text(json.dumps(table, indent=1, sort_keys=True) + "\n", "utf-8")
