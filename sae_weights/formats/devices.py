"""Pipes and devices in a checkpoint's place: a link to /dev/zero never ends, a pipe never begins."""

from __future__ import annotations

import stat
from pathlib import Path

from sae_weights.errors import SAEFormatError


def refuse_devices(path: Path) -> None:
    """Raise SAEFormatError for what is neither a file nor a folder, before anybody opens it. What is absent passes."""
    try:
        mode = path.stat().st_mode
    except OSError:
        return
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise SAEFormatError(f"{path}: is neither a file nor a folder but a pipe or a device")
