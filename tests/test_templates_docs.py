"""docs/templates.md says of every template what the registry says."""

from __future__ import annotations

from pathlib import Path

import pytest

from danlu.text.template_registry import TEMPLATES, NamedTemplate

PAGE = Path(__file__).parents[1] / "docs" / "templates.md"


def row(entry: NamedTemplate) -> str:
    stop = f"`{entry.stop}`" if entry.stop else "end of sequence"
    where = f"[here]({entry.source})" if entry.source.startswith("https://") else entry.source
    return f"| `{entry.name}` | {entry.about} | {stop} | {entry.tools} | {where} |"


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_page_has_every_template(name: str) -> None:
    assert row(TEMPLATES[name]) in PAGE.read_text("utf-8").splitlines()


def test_every_file_has_an_entry() -> None:
    from importlib import resources

    files = resources.files("danlu.text").joinpath("templates").iterdir()
    assert {f.name for f in files} == {f"{name}.jinja" for name in TEMPLATES}
