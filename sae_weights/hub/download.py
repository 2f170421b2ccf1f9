"""Dictionaries on the Hugging Face Hub: only the files that one dictionary needs, pinned to a commit, hashes checked.

``hf://org/repo/path/in/repo@revision``. Files land in the Hub client's own cache. The hashes that the Hub states (sha256
of large files, git's sha1 of small ones) are checked after the download and recorded under the cache folder, with the size
and time of each file: a file that has changed since is hashed again, and is an error if it is no longer the one that the
Hub had. Offline (``HF_HUB_OFFLINE=1``, or no connection) the cache serves.
"""

from __future__ import annotations

import logging
import os
import re
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from sae_weights.errors import SAEFormatError

from .errors import explained
from .files import Listed, Tree, needed
from .place import HubPath
from .record import HubFile, Record, changed, hashes

_log = logging.getLogger(__name__)
_COMMIT = re.compile(r"[0-9a-f]{40}")
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Fetched:
    """What :func:`fetch` brought.

    Attributes:
        local: the folder or file to load, in the Hub client's cache.
        snapshot: that commit's folder there: ``files`` lie below it.
    """

    where: HubPath
    commit: str
    local: Path
    snapshot: Path
    files: tuple[HubFile, ...]

    def provenance(self) -> dict[str, Any]:
        """Where every byte is from: repository, commit, and per file path, size and sha256."""
        return {
            "repo": self.where.repo,
            "path": self.where.path,
            "revision": self.where.revision or "main",
            "commit": self.commit,
            "files": [{"path": f.path, "size": f.size, "sha256": f.sha256} for f in self.files],
        }

    def verify(self) -> None:
        """Hash every file again, whatever its size and time say.

        Raises:
            SAEFormatError: a file is no longer the one whose hash was recorded.
        """
        for file in self.files:
            path = self.snapshot / file.path
            found = hashes(path)[0]
            if found != file.sha256:
                raise changed(self.where, path, f"sha256 {file.sha256}", found)


def fetch(where: HubPath) -> Fetched:
    """Bring what the dictionary at ``where`` needs, unless it is in the cache already; check its hashes.

    Raises:
        SAEFormatError: no such repository, revision or path (with the nearest names), no access, no connection and not in
            the cache, or a file whose hash is not the one that the Hub states.
    """
    commit, online = _commit(where)
    snapshot = _storage(where.repo) / "snapshots" / commit
    record = Record.of(where.repo, commit)
    if where.path not in record.needs or not all((snapshot / f).exists() for f in record.needs[where.path][1]):
        try:
            tree: Tree = _HubTree(where, commit) if online else _SnapshotTree(where, snapshot)
            chosen = needed(tree, where)
        except SAEFormatError as error:
            raise error if online else SAEFormatError(f"{error} (in the cache: the Hub cannot be reached)") from None
        for file in chosen.files:
            if online:
                _download(where, commit, file.path)
            record.expect(file)
        record.needs[where.path] = (chosen.load, [file.path for file in chosen.files])
    load, names = record.needs[where.path]
    files = tuple(record.check(where, snapshot, name) for name in names)
    record.revisions.update({where.revision or "main": commit} if online else {})
    try:
        record.save()
    except OSError as error:  # the files are there and right; they are only hashed again next time
        _log.warning("%s: what was checked cannot be recorded: %s", where, error)
    return Fetched(where, commit, snapshot / load if load else snapshot, snapshot, files)


def _storage(repo: str) -> Path:
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE).expanduser() / f"models--{repo.replace('/', '--')}"


def _commit(where: HubPath) -> tuple[str, bool]:
    """(commit, whether the Hub can be asked)."""
    from huggingface_hub import constants

    revision = where.revision or "main"
    known = revision if _COMMIT.fullmatch(revision) else _known_commit(where.repo, revision)
    if constants.HF_HUB_OFFLINE:
        if known is None:
            raise SAEFormatError(f"{where}: not in the cache, and HF_HUB_OFFLINE is set; unset it to download")
        return known, False
    if known == revision:
        return known, True
    try:
        with explained(where):
            return str(_api().model_info(where.repo, revision=revision, timeout=30).sha), True
    except ConnectionError as error:
        if known is None:
            raise SAEFormatError(f"{where}: not in the cache, and the Hub cannot be reached ({error})") from None
        _log.warning("%s: the Hub cannot be reached; commit %s from the cache", where, known[:12])
        return known, False


def _known_commit(repo: str, revision: str) -> str | None:
    """The commit that ``revision`` meant when the Hub was last asked."""
    reference = _storage(repo) / "refs" / revision
    if reference.is_file():
        return reference.read_text().strip()
    records = sorted(Record.folder(repo).glob("*.json"), key=lambda path: path.stat().st_mtime_ns, reverse=True)
    for path in records:
        commit = Record.of(repo, path.stem).revisions.get(revision)
        if commit is not None:
            return commit
    return None


def _api() -> Any:
    from huggingface_hub import HfApi

    return HfApi(endpoint=os.environ.get("HF_ENDPOINT"), library_name="editserver")


def _download(where: HubPath, commit: str, path: str) -> None:
    from huggingface_hub import hf_hub_download

    with explained(where, connection=True):
        hf_hub_download(where.repo, path, revision=commit, endpoint=os.environ.get("HF_ENDPOINT"))


class _HubTree:
    """The repository at one commit, asked folder by folder."""

    def __init__(self, where: HubPath, commit: str) -> None:
        self._where, self._commit = where, commit

    def kind(self, path: str) -> str | None:
        """``file``, ``folder`` or None."""
        if not path:
            return "folder"
        with explained(self._where, connection=True):
            found = _api().get_paths_info(self._where.repo, [path], revision=self._commit)
        return None if not found else "file" if hasattr(found[0], "blob_id") else "folder"

    def children(self, path: str) -> dict[str, Listed | None]:
        """Name → file, or None for a folder."""
        with explained(self._where, connection=True):
            entries = _api().list_repo_tree(self._where.repo, path or None, revision=self._commit)
            return {PurePosixPath(entry.path).name: _listed(entry) for entry in entries}


def _listed(entry: Any) -> Listed | None:
    if not hasattr(entry, "blob_id"):
        return None
    sha256 = entry.lfs.sha256 if entry.lfs is not None else None
    return Listed(entry.path, sha256=sha256, git_sha1=None if sha256 else entry.blob_id)


class _SnapshotTree:
    """What the cache holds of one commit. The names that its links point to are the Hub's hashes."""

    def __init__(self, where: HubPath, snapshot: Path) -> None:
        self._snapshot = snapshot
        if not snapshot.is_dir():
            raise SAEFormatError(f"{where}: commit {snapshot.name} is not in the cache")

    def kind(self, path: str) -> str | None:
        """``file``, ``folder`` or None."""
        place = self._snapshot / path
        return "folder" if place.is_dir() else "file" if place.is_file() else None

    def children(self, path: str) -> dict[str, Listed | None]:
        """Name → file, or None for a folder."""
        return {
            place.name: None if place.is_dir() else self._file(place) for place in (self._snapshot / path).iterdir()
        }

    def _file(self, place: Path) -> Listed:
        blob = Path(os.readlink(place)).name if place.is_symlink() else ""
        return Listed(
            place.relative_to(self._snapshot).as_posix(),
            sha256=blob if _SHA256.fullmatch(blob) else None,
            git_sha1=blob if _COMMIT.fullmatch(blob) else None,
        )
