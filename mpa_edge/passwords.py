"""Passwords in addresses, as in `s3://USER:PASSWORD@BUCKET`. Addresses end up in files, in messages and in logs: no
flag of `align` takes one with a password, and what others say about theirs is told without it."""

from __future__ import annotations

import re

# What stands before an @ and the host. A password may hold a / or an @ of its own; the 8000 of
# http://localhost:8000/v1#model@2 is none, and neither is what follows in a chain such as dir::file://a::file://b@c.
_ACCOUNT = re.compile(
    r"(?:(?<=://)(?:[^/:@\[#\s]*:(?!:|\d+\b)\S*|[^/#\s]*)"  # ://USER:PASSWORD, or ://TOKEN
    r"|(?<=\bhf:)[^/:@\s]*(?::\S*)?)(?=@)"  # the same of hf:DATASET
)


def holds_secret(address: str) -> bool:
    """Whether an address has a password or another account in it, or a ?, behind which tokens and signatures stand;
    the names of files do not count."""
    whole = "".join(address.split())
    return bool(_ACCOUNT.search(whole) or re.search(r"://.*\?", whole))


def without_passwords(text: str) -> str:
    """The text with *** in place of the accounts in the addresses that it tells."""
    return _ACCOUNT.sub("***", text)
