"""What is known of downloaded files: their hashes, and when they were last checked."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sae_weights.cache import cache_root
from sae_weights.errors import SAEFormatError

from .files import Listed
from .place import HubPath

_BLOCK = 1 << 22
_SHOW_PROGRESS_FROM = 1 << 28


@dataclass(frozen=True)
class HubFile:
    """A file as it was when its hash was checked."""

    path: str
    size: int
    sha256: str


class Record:
    """What is known of one commit's files: per path size, time and hash at the last check."""

    def __init__(self, path: Path, stated: Mapping[str, Any]) -> None:
        self._path = path
        self.files: dict[str, dict[str, Any]] = dict(stated.get("files", {}))
        self.needs: dict[str, tuple[str, list[str]]] = {
            place: (load, list(names)) for place, (load, names) in stated.get("needs", {}).items()
        }
        self.revisions: dict[str, str] = dict(stated.get("revisions", {}))

    @staticmethod
    def folder(repo: str) -> Path:
        return cache_root() / "hub" / repo.replace("/", "--")

    @classmethod
    def of(cls, repo: str, commit: str) -> Record:
        path = cls.folder(repo) / f"{commit}.json"
        try:
            return cls(path, json.loads(path.read_text()))
        except (FileNotFoundError, NotADirectoryError):
            return cls(path, {})
        except (OSError, ValueError, TypeError, AttributeError) as error:
            raise SAEFormatError(f"{path}: a damaged record of downloads ({error}); delete it") from None

    def save(self) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        stated = {"revisions": self.revisions, "needs": self.needs, "files": self.files}
        text = json.dumps(stated, indent=1, sort_keys=True)
        if self._path.exists() and self._path.read_text() == text:
            return
        temporary = self._path.with_name(f"{self._path.name}.{os.getpid()}.part")
        temporary.write_text(text)
        temporary.replace(self._path)

    def expect(self, file: Listed) -> None:
        """Note the hash that the Hub states; what was checked against another one is checked anew."""
        known = self.files.get(file.path, {})
        if file.sha256 is not None and file.sha256 != known.get("sha256"):
            self.files[file.path] = {"sha256": file.sha256}
        elif file.git_sha1 is not None and file.git_sha1 != known.get("git_sha1"):
            self.files[file.path] = {"git_sha1": file.git_sha1}

    def check(self, where: HubPath, snapshot: Path, name: str) -> HubFile:
        """The file as recorded, hashed now unless its size and time are those of the last check."""
        path = snapshot / name
        known = self.files.setdefault(name, {})
        stat = path.stat()
        if known.get("size") == stat.st_size and known.get("mtime_ns") == stat.st_mtime_ns:
            return HubFile(name, stat.st_size, known["sha256"])
        sha256, git_sha1 = hashes(path)
        if known.get("sha256", sha256) != sha256:
            raise changed(where, path, f"sha256 {known['sha256']}", sha256)
        if known.get("git_sha1", git_sha1) != git_sha1:
            raise changed(where, path, f"git blob {known['git_sha1']}", git_sha1)
        known.update(sha256=sha256, size=stat.st_size, mtime_ns=stat.st_mtime_ns)
        return HubFile(name, stat.st_size, sha256)


def changed(where: HubPath, path: Path, expected: str, found: str) -> SAEFormatError:
    return SAEFormatError(
        f"{where}: {path} is not the file that the Hub has: expected {expected}, found {found}; "
        f"delete {path.resolve()} to download it again"
    )


def hashes(path: Path) -> tuple[str, str]:
    """(sha256, the sha1 that git gives the file's content)."""
    size = path.stat().st_size
    sha256, git = hashlib.sha256(), hashlib.sha1(f"blob {size}\0".encode(), usedforsecurity=False)
    with path.open("rb") as file:
        for block in _shown(iter(lambda: file.read(_BLOCK), b""), size, f"checking {path.name}"):
            sha256.update(block)
            if size < _SHOW_PROGRESS_FROM:  # only small files are known by git's hash
                git.update(block)
    return sha256.hexdigest(), git.hexdigest()


def _shown(blocks: Iterator[bytes], size: int, title: str) -> Iterator[bytes]:
    if size < _SHOW_PROGRESS_FROM:
        yield from blocks
        return
    from huggingface_hub.utils import tqdm  # type: ignore[attr-defined]

    with tqdm(total=size, unit="B", unit_scale=True, desc=title) as bar:  # type: ignore[no-untyped-call]
        for block in blocks:
            bar.update(len(block))
            yield block
