"""Pin everything the CPU environment installs: ``make lock`` writes ``requirements/cpu.lock``.

pip resolves the project's dependencies, its extras ``cpu`` and ``dev`` and the pins of ``[tool.editserver.lock]``
in ``pyproject.toml`` together (``pip install --dry-run --report``). The packages named there as ``leave-out`` are then
taken out, along with whatever only they needed, and those ``without-dependencies`` are added. The result lists
every package, so it is installed with ``--no-deps``.
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
LOCK = ROOT / "requirements" / "cpu.lock"
EXTRAS = ("cpu", "dev")
HEADER = """\
# Every package of the CPU environment, for Python 3.11 on Linux x86_64. Made by `make lock` from pyproject.toml;
# installed by `make setup` with --no-deps. Not listed on purpose: {left_out}.
"""


def resolve(requirements: list[str]) -> dict[str, Any]:
    """What pip would install for ``requirements``: canonical name -> its wheel's metadata."""
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed", "--quiet", "--report", "-"]
    command += ["--only-binary", ":all:", *requirements]
    report = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
    return {canonicalize_name(item["metadata"]["name"]): item["metadata"] for item in report["install"]}


def reachable(roots: list[str], resolved: dict[str, Any], leave_out: set[str]) -> set[str]:
    """The packages that ``roots`` need (markers and extras as on this machine) when ``leave_out`` are not followed."""
    seen: set[tuple[str, str]] = set()
    pending = [Requirement(root) for root in roots]
    while pending:
        wanted = pending.pop()
        name = canonicalize_name(wanted.name)
        if name in leave_out or name not in resolved:
            continue
        for extra in ("", *wanted.extras):
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
    project, settings = pyproject["project"], pyproject["tool"]["editserver"]["lock"]
    roots = list(project["dependencies"]) + list(settings["pins"])
    for extra in EXTRAS:
        roots += project["optional-dependencies"][extra]
    leave_out = {canonicalize_name(name) for name in settings["leave-out"]}
    resolved = resolve(roots)
    kept = sorted(reachable(roots, resolved, leave_out))
    lines = [f"{name}=={resolved[name]['version']}" for name in kept]
    lines = sorted([*lines, *settings["without-dependencies"]], key=lambda line: line.split("==")[0])
    LOCK.parent.mkdir(exist_ok=True)
    LOCK.write_text(HEADER.format(left_out=", ".join(sorted(leave_out))) + "\n".join(lines) + "\n")
    print(f"{LOCK.relative_to(ROOT)}: {len(lines)} packages")


if __name__ == "__main__":
    main()
