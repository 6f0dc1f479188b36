"""What the table in docs/families.md says is so: every family loads, chats, learns, is served and converted."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from family_table import CAN, EXPECTED, FAMILIES, examine, folder_of

QUICK = ("opt", "bart", "original:moss")
ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(
    "kind", [pytest.param(k, marks=[] if k in QUICK else [pytest.mark.slow]) for k in FAMILIES.values()]
)
def test_a_family_can_do_all_of_it(kind: str, tmp_path: Path) -> None:
    folder = folder_of(kind, tmp_path / "model", Path(os.environ.get("DANLU_SHARED", ROOT.parent / "shared")))
    if folder is None:
        pytest.skip(f"FAMILY NOT TESTED: no recording of {kind}, or no class for it")
    assert examine(folder, tmp_path) == dict.fromkeys(CAN, "yes") | EXPECTED.get(kind, {})


def test_the_table_is_of_these_families() -> None:
    found = json.loads((ROOT / "docs" / "families.json").read_text("utf-8"))
    assert found.keys() == FAMILIES.keys()
    assert all(row.keys() == set(CAN) for row in found.values())
    page = (ROOT / "docs" / "families.md").read_text("utf-8")
    assert all(f"| {name} |" in page for name in found)
