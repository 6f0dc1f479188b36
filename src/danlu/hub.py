"""The model hub when there is no network: said at once, and not after half a minute of retries."""

from __future__ import annotations

import os
import socket
from urllib.parse import urlsplit

PROXIES = ("HTTPS_PROXY", "https_proxy", "HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy")


def notice_no_network() -> None:
    """Before the hub is asked for a model: where its name cannot be looked up, only its cache is read, as with HF_HUB_OFFLINE=1.

    Behind a proxy names need not be known here, so then it is asked as ever; so it is with HF_HUB_OFFLINE=0.
    """
    from huggingface_hub import constants

    if os.environ.get("HF_HUB_OFFLINE") or os.environ.get("TRANSFORMERS_OFFLINE") or any(map(os.environ.get, PROXIES)):
        return
    constants.HF_HUB_OFFLINE = not _is_known(urlsplit(constants.ENDPOINT).hostname)


def _is_known(host: str | None) -> bool:
    try:
        socket.getaddrinfo(host, None)
    except OSError:
        return False
    return True
