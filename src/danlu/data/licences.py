"""Which licences of data allow commercial use. The table is `licences.json`: SPDX ids and the names that sets use."""

from __future__ import annotations

import json
import re
from functools import cache
from importlib import resources


def commercial_use(licence: str) -> bool | None:
    """Whether a licence allows commercial use; None if the table does not know it."""
    return licence_table().get(_plain(licence))


@cache
def licence_table() -> dict[str, bool]:
    """Every known licence, as `commercial_use` spells it, and whether it allows commercial use."""
    table = json.loads(resources.files("danlu.data").joinpath("licences.json").read_text("utf-8"))
    allowed = {_plain(name): True for name in table["commercial"]}
    return allowed | {_plain(name): False for name in table["not_commercial"]}


def _plain(licence: str) -> str:
    """One spelling: `CC BY-NC 4.0`, `cc_by_nc_4.0` and `CC-BY-NC-4.0` are the same."""
    return re.sub(r"[\s_-]+", "-", licence.strip().lower().removesuffix(" license").removesuffix(" licence"))
