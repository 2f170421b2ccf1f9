"""Prefix-cache salts: KV computed under one edit is never read under another.

Domains are separated, so that no string a client can send equals an edited salt. All salts are hex (vLLM allows up to
128 characters without ``@ / \\``).
"""

from __future__ import annotations

import hashlib


def _hash(*parts: str) -> str:
    sha = hashlib.sha256()
    for part in parts:
        encoded = part.encode("utf-8", "surrogatepass")
        sha.update(len(encoded).to_bytes(8, "little") + encoded)
    return sha.hexdigest()


def plain_salt(user_salt: str | None) -> str | None:
    """Salt of a request without edits: ``H("plain", salt)``, or none at all when the user sent none."""
    return None if user_salt is None else _hash("plain", user_salt)


def edit_salt(user_salt: str | None, digest: str, prompt_len: int | None) -> str:
    """Salt of an edited request: ``H("edit", salt, digest[, prompt_len])``.

    ``prompt_len`` is given when the program depends on where the prompt ends: a token that was *generated* here is part
    of the *prompt* in the next turn of the chat, and must not bring its KV along.
    """
    return _hash(
        "edit", "" if user_salt is None else "s" + user_salt, digest, "" if prompt_len is None else str(prompt_len)
    )
