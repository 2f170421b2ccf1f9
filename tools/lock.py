"""Pin everything the environments install: ``make lock`` writes ``requirements/cpu.lock`` and ``oracle.lock``.

pip resolves an environment's requirements together (``pip install --dry-run --report``): for ``cpu`` the project's
dependencies, its extras ``cpu`` and ``dev`` and the pins in ``pyproject.toml`` (``[tool.editserver.lock.cpu]``); for
``oracle`` the pins of that name, constrained by ``cpu.lock``, because that environment lies on top of the first and
lists only what it adds. Packages named as ``leave-out`` are then taken out along with whatever only they needed, and
those ``without-dependencies`` are added. A lock names every package, so it is installed with ``--no-deps``.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

from pip._vendor.packaging.requirements import Requirement
from pip._vendor.packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
LOCKS = ROOT / "requirements"
EXTRAS = ("cpu", "dev")
HEADER = """\
# Every package {adds}, for Python 3.11 on Linux x86_64. Made by `make lock` from pyproject.toml;
# installed by `make setup` with --no-deps. Left out on purpose: {left_out}.
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


def pinned_lines(roots: list[str], settings: dict[str, list[str]], *options: str) -> list[str]:
    """``name==version`` for every package that ``roots`` need under an environment's ``settings``."""
    leave_out = {canonicalize_name(name) for name in settings["leave-out"]}
    resolved = resolve(roots, *options)
    lines = [f"{name}=={resolved[name]['version']}" for name in reachable(roots, resolved, leave_out)]
    return sorted([*lines, *settings["without-dependencies"]], key=lambda line: line.partition("==")[0])


def write_lock(name: str, adds: str, lines: list[str], left_out: list[str]) -> Path:
    path = LOCKS / f"{name}.lock"
    LOCKS.mkdir(exist_ok=True)
    path.write_text(HEADER.format(adds=adds, left_out=", ".join(left_out)) + "\n".join(lines) + "\n")
    print(f"{path.relative_to(ROOT)}: {len(lines)} packages")
    return path


def main() -> None:
    with (ROOT / "pyproject.toml").open("rb") as file:
        pyproject = tomllib.load(file)
    project, locks = pyproject["project"], pyproject["tool"]["editserver"]["lock"]

    roots = [*project["dependencies"], *locks["cpu"]["pins"]]
    for extra in EXTRAS:
        roots += project["optional-dependencies"][extra]
    base = pinned_lines(roots, locks["cpu"], "--only-binary", ":all:")
    constraints = write_lock("cpu", "of the CPU environment", base, locks["cpu"]["leave-out"])

    oracle = pinned_lines(locks["oracle"]["pins"], locks["oracle"], "--constraint", str(constraints))
    added = [line for line in oracle if line not in base]
    write_lock("oracle", "that sae-lens needs on top of cpu.lock", added, locks["oracle"]["leave-out"])


if __name__ == "__main__":
    main()
