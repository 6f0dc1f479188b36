"""The model hub when there is no network: said at once, and not after half a minute of retries."""

from __future__ import annotations

import os
import socket
from urllib.parse import urlsplit

PROXIES = ("HTTPS_PROXY", "https_proxy", "HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy")


def notice_no_network() -> None:
    """Before the hub is asked for a model: where its name cannot be looked up, only its cache is read, as with HF_HUB_OFFLINE=1.

    Behind a proxy names need not be known here, so then it is asked as ever.
    """
    from huggingface_hub import constants

    if os.environ.get("HF_HUB_OFFLINE") or os.environ.get("TRANSFORMERS_OFFLINE") or any(map(os.environ.get, PROXIES)):
        return
    url = urlsplit(constants.ENDPOINT)
    try:
        socket.getaddrinfo(url.hostname, url.port or 443)
    except OSError:
        constants.HF_HUB_OFFLINE = True
    else:
        constants.HF_HUB_OFFLINE = False
