"""`/`: the chat page, rendered here; its script and style are files of the package."""

from __future__ import annotations

import json
from functools import cache
from importlib import resources
from typing import Any, Final

from fastapi import APIRouter, Request
from fastapi.responses import HTMLResponse
from jinja2 import Environment, PackageLoader, StrictUndefined

router = APIRouter()
LANGUAGES: Final = {"zh": "zh-CN", "en": "en"}


@cache
def _environment() -> Environment:
    loader = PackageLoader("danlu.serve", "web/templates")
    return Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)


@cache
def _texts() -> dict[str, dict[str, str]]:
    texts: dict[str, dict[str, str]] = json.loads(
        resources.files("danlu.serve").joinpath("web/texts.json").read_text("utf-8")
    )
    return texts


def language(accepted: str) -> str:
    """The first language of an `Accept-Language` header that the page speaks; English without one."""
    for entry in accepted.split(","):
        code = entry.partition(";")[0].strip().lower().partition("-")[0]
        if code in LANGUAGES:
            return code
    return "en"


@router.get("/", include_in_schema=False)
def page(request: Request) -> HTMLResponse:
    """The page in the browser's language."""
    state = request.app.state
    spoken = language(request.headers.get("accept-language", ""))
    texts = _texts()[spoken]
    defaults = state.assistant.defaults
    settings: dict[str, Any] = {
        "model": state.model_name,
        "params": {
            "temperature": defaults.temperature,
            "top_p": defaults.top_p,
            "max_tokens": defaults.max_new_tokens,
        },
        "texts": texts,
    }
    html = (
        _environment()
        .get_template("chat.html")
        .render(language=LANGUAGES[spoken], model=state.model_name, texts=texts, settings=settings)
    )
    return HTMLResponse(html, headers={"Cache-Control": "no-store", "Vary": "Accept-Language"})
