"""Fill the virtual environment this Python belongs to: ``python tools/setup_venv.py LOCK… [PROJECT…]``.

torch goes first, because its CPU build is not on PyPI. pip's own configuration is tried before anything else
(a company mirror, a folder of wheels), then PyTorch's public index of CPU wheels. The rest of the locks follows with
``--no-deps``: they are complete, and resolving again would bring back what they leave out. Last come the projects
(folders with a ``pyproject.toml``), editable.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
import sys
from pathlib import Path

PYTORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"


def pip(*arguments: str, quiet: bool = False) -> bool:
    """Run pip in this environment; True when it succeeded. ``quiet`` keeps its error for itself."""
    # setuptools warns at length about editable installs as such; its errors still show.
    environment = os.environ | {"PYTHONWARNINGS": "ignore"}
    command = [sys.executable, "-m", "pip", "install", "--disable-pip-version-check", "--no-input", *arguments]
    return subprocess.run(command, env=environment, stderr=subprocess.DEVNULL if quiet else None).returncode == 0


def installed_version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def install_torch(pin: str) -> None:
    """Install the pinned CPU build, e.g. ``torch==2.13.0+cpu``; PyPI has the plain version for macOS only."""
    if installed_version("torch") == pin.partition("==")[2]:
        return
    if platform.system() == "Darwin":
        pin = pin.partition("+")[0]
    print(f"installing {pin}", flush=True)
    if pip("--quiet", "--no-deps", pin, quiet=True):
        return
    if not pip("--quiet", "--no-deps", "--extra-index-url", PYTORCH_CPU_INDEX, pin):
        sys.exit(
            f"setup: {pin} was found neither through pip's configuration nor at {PYTORCH_CPU_INDEX}. Put its wheel "
            "into a folder and say `export PIP_FIND_LINKS=that/folder`, then run `make setup` again."
        )


def main() -> None:
    if sys.prefix == sys.base_prefix:
        sys.exit("setup: this Python is not in a virtual environment; run `make setup` instead.")
    locks = [argument for argument in sys.argv[1:] if argument.endswith(".lock")]
    projects = [argument for argument in sys.argv[1:] if not argument.endswith(".lock")]
    for lock in locks:
        for line in Path(lock).read_text(encoding="utf-8").splitlines():
            if line.startswith("torch=="):
                install_torch(line)
        print(f"installing {lock}", flush=True)
        if not pip("--quiet", "--no-deps", "--requirement", lock):
            sys.exit(f"setup: a package of {lock} could not be installed; pip's message is above.")
    for project in projects:
        if not pip("--quiet", "--no-deps", "--no-build-isolation", "--editable", project):
            sys.exit(f"setup: {project} could not be installed; pip's message is above.")


if __name__ == "__main__":
    main()
