"""URLs without their credentials, for messages, records and reports.

What stands before the host (user, password, access key) and all values behind `?` and `#` (tokens, signatures) becomes
`***`. Where a text could be read in two ways, the reading that hides more is taken.
"""

from __future__ import annotations

import re
from urllib.parse import quote, unquote

HIDDEN = "***"
# "s3://", and "s3:/" as pathlib writes it; the rest of the URL up to white space or a quotation mark
_URL = re.compile(r"""(?P<scheme>[A-Za-z][A-Za-z0-9+.\-]*:/{1,3})(?P<rest>[^\s'"<>`]+)""")
_SHORT = 4  # characters below which a secret is not looked for by itself: it would be found in ordinary words


def redacted(text: str) -> str:
    """A text with the credentials of all URLs in it hidden."""
    if ":/" not in text:
        return text
    return _URL.sub(lambda match: match["scheme"] + _hidden(match["rest"]), text)


def _hidden(rest: str) -> str:
    """Part of a URL after the scheme, without credentials."""
    place, mark, _ = _parted(rest)
    authority, slash, path = place.partition("/")
    _, at, host = authority.rpartition("@")
    if at:
        place = f"{HIDDEN}@{host}{slash}{path}"
    elif ":" in authority and "@" in path:  # a password with a slash in it, as secret keys have them
        place = f"{HIDDEN}@{path.rpartition('@')[2]}"
    if not mark:
        return place
    return f"{place}{mark}{HIDDEN}"


def _parted(rest: str) -> tuple[str, str, str]:
    """Split a URL at its query or fragment: the part before, the separator, and the part after.

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
    """A text, such as a library's error about this URL, with the URL's credentials hidden wherever they stand."""
    for secret in sorted(_secrets(url), key=len, reverse=True):
        text = text.replace(secret, HIDDEN)
    return redacted(text)


def _secrets(url: str) -> set[str]:
    """The credentials in a URL, as they are written there and as a library may write them."""
    found: set[str] = set()
    for match in _URL.finditer(url):
        place, _, query = _parted(match["rest"])
        for at in (one.start() for one in re.finditer("@", place)):  # any of them may end the password
            found |= {place[:at], *place[:at].split(":", 1)}
        found |= {value for part in re.split("[&;#]", query) for value in (part, part.partition("=")[2])}
    plain = found | {unquote(one) for one in found}
    written = {quote(one, safe=safe) for one in plain for safe in ("", "/")}
    return {one for one in plain | written if len(one) >= _SHORT}


def has_secrets(url: str) -> bool:
    return redacted(url) != url
