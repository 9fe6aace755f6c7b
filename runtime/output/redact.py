"""Secrets out of what is shown or written: tokens, keys and passwords, wherever they come from.

Known are those of the environment, of huggingface_hub's files and those that `hide` was told. What only
looks like a secret, such as the query of a URL, may be something else in a result, and is taken out of
messages alone.
"""

import os
import re
from functools import lru_cache
from pathlib import Path
from urllib.parse import parse_qsl, quote, urlsplit

HIDDEN = "<token>"

_told: set[str] = set()
_NAMES = re.compile(r"(^|_)(TOKEN|API_?KEY|ACCESS_KEY|SECRET|PASSWORD)$", re.IGNORECASE)  # of variables
_ADDRESSES = re.compile(r"(_ENDPOINT|_PROXY|_URL)$", re.IGNORECASE)  # of variables that may hold a password
_SHORTEST, _SHORTEST_FOUND = 4, 8  # characters of a secret that was told, and of one that was found
_LONG = 12  # characters from which on a secret is looked for within words, too
_TOKENS = re.compile(r"\b(hf|api_org)_[A-Za-z0-9]{20,}|(?<=Bearer )[^\s'\",;]+")
_HEADER = re.compile(r"(?i)(authorization['\"]?\s*[:=]\s*['\"]?(?:[a-z]+ )?)[^\s'\",;<]+")
_URL = re.compile(
    r"(?i)\b(?P<scheme>[a-z][a-z+.-]{0,20}://)(?:[^\s/?#@'\"]+@)?(?P<rest>[^\s?#'\"<>]*)(?P<query>\?[^\s'\"<>]*)?"
)
_QUERY = re.compile(
    r"(?i)([?&](?:[\w-]{0,40}(?:token|key|secret|password|signature|credential)|sig|auth)=)[^\s&'\"<>]+"
)


def hide(secret: str | None) -> None:
    """Take a secret out of every text from now on."""
    if secret and len(secret) >= _SHORTEST:
        _told.add(secret)


def redact(text: str) -> str:
    """The text without the secrets that are known."""
    pattern = _pattern(frozenset(_told | _of_environment()))
    return pattern.sub(HIDDEN, text) if pattern else text


def redact_message(text: str) -> str:
    """The text without them, and without anything that looks like one."""
    text = _TOKENS.sub(HIDDEN, redact(text))
    text = _HEADER.sub(rf"\1{HIDDEN}", text)
    text = _URL.sub(
        lambda found: f"{found['scheme']}{found['rest']}" + ("?…" if found["query"] else ""), text
    )
    return _QUERY.sub(rf"\1{HIDDEN}", text)


@lru_cache(maxsize=8)
def _pattern(secrets: frozenset[str]) -> re.Pattern[str] | None:
    forms = {form for secret in secrets for form in (secret, quote(secret, safe=""))}
    parts = [
        re.escape(form) if len(form) >= _LONG else rf"(?<!\w){re.escape(form)}(?!\w)"
        for form in sorted(forms, key=len, reverse=True)
    ]
    return re.compile("|".join(parts)) if parts else None


def _of_environment() -> set[str]:
    found: set[str] = set()
    for name, value in os.environ.items():
        if _NAMES.search(name):
            found.add(value.strip())
        elif _ADDRESSES.search(name):
            found |= _of_url(value)
    for line in _token_files(os.environ.get("HF_HOME"), os.environ.get("HF_TOKEN_PATH")):
        found.add(line)
    return {secret for secret in found if len(secret) >= _SHORTEST_FOUND}


def _of_url(url: str) -> set[str]:
    """The password and the values of the query of an address."""
    try:
        parts = urlsplit(url)
        return {parts.password or "", *(value for _, value in parse_qsl(parts.query))}
    except ValueError:
        return set()


@lru_cache(maxsize=8)
def _token_files(home: str | None, path: str | None) -> tuple[str, ...]:
    """The tokens that `hf auth login` keeps."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    folder = Path(home).expanduser() if home else cache / "huggingface"
    found = []
    for file in (Path(path).expanduser() if path else folder / "token", folder / "stored_tokens"):
        try:
            lines = file.read_text(encoding="utf-8").splitlines()
        except (OSError, ValueError):
            continue
        found += [line.rpartition("=")[2].strip() for line in lines if not line.startswith("[")]
    return tuple(found)
