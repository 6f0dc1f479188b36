"""AdaLoRA in the report: which ranks were left where, and what the adapter's size came to."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Final

from danlu.pipeline.report_words import number

KEYS: Final = ("ranks", "rank_before", "rank_total", "adapter_parameters_before", "adapter_parameters")
_LAYER: Final = re.compile(r"(?:^|\.)(\d+)\.")


def rank_tiles(facts: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Label, value and note of a stage's tiles; none without AdaLoRA."""
    if not all(facts.get(key) is not None for key in KEYS):
        return []
    return [
        ("Ranks", number(facts["rank_total"]), f"{number(facts['rank_before'])} before training"),
        (
            "Adapter's parameters",
            number(facts["adapter_parameters"]),
            f"{number(facts['adapter_parameters_before'])} before pruning",
        ),
    ]


def rank_rows(facts: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The final pattern: for each kind of module, its ranks from the first layer to the last."""
    found: dict[str, list[tuple[int, int]]] = {}
    roles = facts.get("ranks") or {}
    for role, ranks in roles.items():
        for name, rank in ranks.items():
            layer = _LAYER.search(name)
            kind = name[layer.end() :] if layer else name
            label = f"{role}: {kind}" if len(roles) > 1 else kind
            found.setdefault(label, []).append((int(layer[1]) if layer else 0, int(rank)))
    return [
        (label, f"{' '.join(str(rank) for _, rank in sorted(several))} (sum {sum(rank for _, rank in several)})")
        for label, several in found.items()
    ]
