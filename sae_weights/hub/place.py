"""What ``hf://org/repo/path/in/repo@revision`` says."""

from __future__ import annotations

import re
from dataclasses import dataclass

from sae_weights.errors import SAEFormatError

SCHEME = "hf://"
_REPO = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


@dataclass(frozen=True)
class HubPath:
    """A folder or file in a repository; ``path`` "" is the whole repository, ``revision`` a branch, tag or commit."""

    repo: str
    path: str = ""
    revision: str | None = None

    @classmethod
    def parse(cls, text: str) -> HubPath:
        """``[hf://]org/repo[/path][@revision]``.

        Raises:
            SAEFormatError: it does not read so.
        """
        place, _, revision = text.removeprefix(SCHEME).partition("@")
        parts = place.strip("/").split("/")
        repo = "/".join(parts[:2])
        if len(parts) < 2 or not _REPO.fullmatch(repo) or any(p in ("", ".", "..") for p in parts):
            raise SAEFormatError(f"{text!r}: expected hf://org/repo/path/in/repo, with @revision behind it to pin one")
        if text.endswith("@"):
            raise SAEFormatError(f"{text!r}: no revision behind '@'; expected a branch, a tag or a commit")
        return cls(repo, "/".join(parts[2:]), revision or None)

    def __str__(self) -> str:
        place = f"{SCHEME}{self.repo}" + (f"/{self.path}" if self.path else "")
        return place + (f"@{self.revision}" if self.revision else "")
