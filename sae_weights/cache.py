"""Where things that are made or fetched once per machine are kept."""

from __future__ import annotations

import os
from pathlib import Path


def cache_root() -> Path:
    """``$EDITSERVER_CACHE``, else ``$XDG_CACHE_HOME/editserver``, else ``~/.cache/editserver``.

    ``editserver.demo.model`` has the same, for commands that have no need of torch, which this package imports.
    """
    if explicit := os.environ.get("EDITSERVER_CACHE"):
        return Path(explicit).expanduser()
    xdg = os.environ.get("XDG_CACHE_HOME")
    return (Path(xdg) if xdg else Path.home() / ".cache") / "editserver"
