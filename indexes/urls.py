"""Redaction of credentials in URLs, for messages, records and reports.

Everything before the host (user, password, access key) and after `?` or `#` (tokens, signatures) is replaced by `***`.
Ambiguous text is read in the way that hides more.
"""

from __future__ import annotations

import re
from urllib.parse import quote, unquote

HIDDEN = "***"
# "s3://", and "s3:/" as pathlib writes it; the rest of the URL up to white space or a quotation mark
_URL = re.compile(r"""(?P<scheme>[A-Za-z][A-Za-z0-9+.\-]*:/{1,3})(?P<rest>[^\s'"<>`]+)""")
_SHORT = 4  # shorter secrets are not searched for on their own, since they occur in ordinary words


def redacted(text: str) -> str:
    """Return the text with the credentials of all URLs in it hidden."""
    if ":/" not in text:
        return text
    return _URL.sub(lambda match: match["scheme"] + _hide_credentials(match["rest"]), text)


def _hide_credentials(rest: str) -> str:
    """Hide the credentials in the part of a URL after the scheme."""
    place, mark, _ = _split_at_query(rest)
    authority, slash, path = place.partition("/")
    _, at, host = authority.rpartition("@")
    if at:
        place = f"{HIDDEN}@{host}{slash}{path}"
    elif ":" in authority and "@" in path:  # a password that contains a slash, as secret keys may
        place = f"{HIDDEN}@{path.rpartition('@')[2]}"
    if not mark:
        return place
    return f"{place}{mark}{HIDDEN}"


def _split_at_query(rest: str) -> tuple[str, str, str]:
    """Split a URL at its query or fragment. Returns the part before, the separator, and the part after.

    A question mark or # before the last @ of the authority belongs to a password.
    """
    at = rest.rfind("@")
    for place, mark in enumerate(rest):
        if mark in "?#":
            before = rest[:place]
            if place < at and ":" in before and "/" not in before:
                continue
            return before, mark, rest[place + 1 :]
    return rest, "", ""


def without_secrets_of(url: str, text: str) -> str:
    """Hide the credentials of this URL anywhere in a text, such as a library's error message."""
    for secret in sorted(_secrets(url), key=len, reverse=True):
        text = text.replace(secret, HIDDEN)
    return redacted(text)


def _secrets(url: str) -> set[str]:
    """Return the credentials in a URL, as written and in the quoted and unquoted forms that a library may print."""
    secrets: set[str] = set()
    for match in _URL.finditer(url):
        place, _, query = _split_at_query(match["rest"])
        for at in (sign.start() for sign in re.finditer("@", place)):  # any @ may end the password
            secrets |= {place[:at], *place[:at].split(":", 1)}
        secrets |= {value for part in re.split("[&;#]", query) for value in (part, part.partition("=")[2])}
    plain = secrets | {unquote(secret) for secret in secrets}
    written = {quote(secret, safe=safe) for secret in plain for safe in ("", "/")}
    return {secret for secret in plain | written if len(secret) >= _SHORT}


def has_secrets(url: str) -> bool:
    """Return whether a URL has credentials."""
    return redacted(url) != url
