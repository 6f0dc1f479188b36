"""The model hub without a network."""

from __future__ import annotations

import socket
from typing import Any
from urllib.parse import urlsplit

import pytest
from huggingface_hub import constants

from danlu.exceptions import ModelError
from danlu.hub import PROXIES, notice_no_network
from danlu.models.load import load_model


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Names that are looked up; none is known. Nothing else is said about the network."""
    for name in (*PROXIES, "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    names: list[Any] = []

    def unknown(host: str, *rest: Any, **_: Any) -> Any:
        names.append(host)
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    return names


def test_without_a_network_it_is_said_at_once(asked: list[Any], capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ModelError, match=r"config\.json cannot be read") as error:
        load_model("owner/name")
    assert "needs no network" in str(error.value)
    assert "Retrying" not in capfd.readouterr().err
    assert asked == [urlsplit(constants.ENDPOINT).hostname], "the hub's own six tries would ask as often"


def test_the_network_may_come_back(asked: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    notice_no_network()
    assert constants.is_offline_mode()
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: [])
    notice_no_network()
    assert not constants.is_offline_mode()


@pytest.mark.parametrize("name", ["https_proxy", "HF_HUB_OFFLINE"])
def test_names_are_not_looked_up_behind_a_proxy_or_when_told_to_stay_offline(
    name: str, asked: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, "1")
    notice_no_network()
    assert not asked and not constants.HF_HUB_OFFLINE
