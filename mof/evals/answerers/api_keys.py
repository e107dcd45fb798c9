"""An API key goes to its own endpoint only, and into no message."""

from __future__ import annotations

import base64
import html
import json
import os
import re
from ipaddress import ip_address
from urllib.parse import quote, urlsplit

OPENAI_HOST, OPENAI_KEY = "api.openai.com", "OPENAI_API_KEY"


def key_for(url: str, variable: str | None) -> str:
    """Return the key for an endpoint; "" if no key is to be sent.

    Args:
        variable: environment variable with the key. None takes OPENAI_API_KEY for hosts of OpenAI, and no key for other hosts.

    Raises:
        ValueError: for a key that no HTTP header takes, or that would travel over plain http to another machine.
    """
    parts = urlsplit(url)
    host = (parts.hostname or "").rstrip(".")
    if variable is None and f".{host}".endswith(f".{OPENAI_HOST}"):
        variable = OPENAI_KEY
    key = os.environ.get(variable, "").strip() if variable else ""
    if not (key.isascii() and key.isprintable()):
        raise ValueError(f"the API key in {variable} holds characters that no HTTP header takes")
    if key and parts.scheme != "https" and not _is_this_machine(host):
        raise ValueError(f"endpoint {url!r}: the key in {variable} is not sent over plain http to another machine; give an https address")
    return key


def _is_this_machine(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def without_key(text: str, key: str) -> str:
    """Return the text with *** for the key, also if it is escaped, encoded in base64 or broken by white space."""
    if not key:
        return text
    spellings = {key, quote(key, safe=""), html.escape(key), json.dumps(key)[1:-1], key.replace("/", "\\/")}
    spellings |= {base64.b64encode(said.encode()).decode().rstrip("=") for said in (key, f"Bearer {key}")}
    for spelling in sorted(spellings, key=len, reverse=True):
        text = re.sub(r"\s*".join(map(re.escape, spelling)), "***", text, flags=re.IGNORECASE)
    return text
