"""Pin everything the environments install: ``make lock`` writes ``requirements/{cpu,dev,oracle}.lock``.

Each lock lies on top of the ones before it: pip resolves its requirements with those as constraints
(``pip install --dry-run --report``), and it lists only what it adds. What a lock is for stands in ``pyproject.toml``
(``[tool.editserver.lock.NAME]``): extras of this project, exact pins, packages to ``leave-out`` along with whatever
only they need, and packages wanted ``without-dependencies``. A lock names every package, so it is installed with
``--no-deps``.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path
from typing import Any

from pip._vendor.packaging.requirements import Requirement
from pip._vendor.packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
LOCKS = ROOT / "requirements"
HEADER = """\
# Python 3.11, Linux x86_64. Made by `make lock` from [tool.editserver.lock.{name}] in pyproject.toml; complete on
# top of the locks before it (cpu, dev, oracle), so installed with --no-deps. Left out on purpose: {left_out}.
"""


def resolve(requirements: list[str], *options: str) -> dict[str, Any]:
    """What pip would install for ``requirements``: canonical name -> its metadata (``requires_dist`` included)."""
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed", "--quiet", "--report", "-"]
    report = json.loads(subprocess.run([*command, *options, *requirements], check=True, stdout=subprocess.PIPE).stdout)
    return {canonicalize_name(item["metadata"]["name"]): item["metadata"] for item in report["install"]}


def reachable(roots: list[str], resolved: dict[str, Any], leave_out: set[str]) -> set[str]:
    """The packages that ``roots`` need (markers as on this machine) when ``leave_out`` are not followed."""
    seen: set[tuple[str, str]] = set()
    pending = [Requirement(root) for root in roots]
    while pending:
        wanted = pending.pop()
        name = canonicalize_name(wanted.name)
        if name in leave_out or name not in resolved:
            continue
        for extra in {"", *wanted.extras}:
            if (name, extra) in seen:
                continue
            seen.add((name, extra))
            for line in resolved[name].get("requires_dist", []):
                needed = Requirement(line)
                if needed.marker is None or needed.marker.evaluate({"extra": extra}):
                    pending.append(needed)
    return {name for name, _ in seen}


def main() -> None:
    with (ROOT / "pyproject.toml").open("rb") as file:
        pyproject = tomllib.load(file)
    project = pyproject["project"]
    LOCKS.mkdir(exist_ok=True)
    pinned: list[str] = []
    for name, settings in pyproject["tool"]["editserver"]["lock"].items():
        roots = [*settings["pins"]]
        for extra in settings["extras"]:
            roots += project["optional-dependencies"][extra]
        if not pinned:
            roots += project["dependencies"]
        leave_out = {canonicalize_name(package) for package in settings["leave-out"]}
        with tempfile.NamedTemporaryFile("w", suffix=".txt") as constraints:
            constraints.write("\n".join(pinned))
            constraints.flush()
            resolved = resolve(roots, "--constraint", constraints.name)
        lines = [f"{package}=={resolved[package]['version']}" for package in reachable(roots, resolved, leave_out)]
        added = sorted(
            {*lines, *settings["without-dependencies"]} - {*pinned}, key=lambda line: line.partition("==")[0]
        )
        pinned += added
        header = HEADER.format(name=name, left_out=", ".join(settings["leave-out"]) or "nothing")
        (LOCKS / f"{name}.lock").write_text(header + "\n".join(added) + "\n")
        print(f"requirements/{name}.lock: {len(added)} packages")


if __name__ == "__main__":
    main()
