"""Where the bytes of a dictionary that was on this machine are from: its files and their hashes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .hub import CONFIGS, TENSORS, hashes


def of_local_files(path: Path) -> dict[str, Any]:
    """``{"path", "files": [{"path", "size", "sha256"}]}`` of a file, or of a folder's tensors and configuration.

    ``path`` is the last part only: where it lay on this machine concerns nobody else.
    """
    if path.is_file():
        files = [path]
    else:
        places = (*path.iterdir(), *(path / "checkpoints").glob("*"))
        files = sorted(p for p in places if p.is_file() and (p.suffix in TENSORS or p.name in CONFIGS))
    stated = [
        {
            "path": path.name if file == path else file.relative_to(path).as_posix(),
            "size": file.stat().st_size,
            "sha256": hashes(file)[0],
        }
        for file in files
    ]
    return {"path": path.resolve().name, "files": stated}
