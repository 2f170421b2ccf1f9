"""``editserver doctor``: everything that a server needs on this machine, checked, with the command that mends it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from rich.console import Console
from rich.table import Table

from editserver.engine.compat.version import UnsupportedVllm, check_vllm

SELFTEST_S = 300
KV_GIB_ADVISED = 1


@dataclass(frozen=True)
class Finding:
    """One line of the report. ``mend`` is empty where nothing is wrong; a ``warning`` does not fail the check."""

    name: str
    detail: str
    mend: str = ""
    warning: bool = False

    @property
    def ok(self) -> bool:
        """Whether nothing has to be mended before a server can run."""
        return not self.mend or self.warning


def python_version() -> Finding:
    """Python 3.11 or later."""
    version = ".".join(map(str, sys.version_info[:3]))
    return Finding("Python", version, "" if sys.version_info >= (3, 11) else "install Python 3.11 or later")


def torch_build() -> Finding:
    """torch imports, and its companions are builds for the same device (a CUDA torchvision breaks a CPU torch)."""
    try:
        import torch
    except Exception as error:  # a broken build fails in many ways, an OSError of the loader among them
        return Finding("torch", f"cannot be imported: {error}", "reinstall torch (make setup)")
    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU build"
    mismatched = [name for name in ("torchvision", "torchaudio") if not _same_build(name, torch.__version__)]
    if mismatched:
        found = ", ".join(f"{name} {metadata.version(name)}" for name in mismatched)
        return Finding("torch", f"{torch.__version__} beside {found}", f"pip uninstall {' '.join(mismatched)}")
    return Finding("torch", f"{torch.__version__} ({build})")


def _same_build(name: str, torch_version: str) -> bool:
    try:
        version = metadata.version(name)
    except metadata.PackageNotFoundError:
        return True
    return version.partition("+")[2] == torch_version.partition("+")[2]


def vllm_build() -> Finding:
    """vLLM is installed, in a version that is known here."""
    try:
        found = check_vllm()
    except UnsupportedVllm as error:
        message, _, mend = str(error).partition("; run: ")
        return Finding("vLLM", message, mend or "see the message")
    return Finding("vLLM", f"{found.flavour} {found.version}")


def plugins() -> Finding:
    """vLLM sees both entry points, and they import."""
    from editserver.cli.serve import UsageError, check_plugins

    try:
        check_plugins()
    except UsageError as error:
        message, _, mend = str(error).partition("; run: ")
        return Finding("plugins", message, mend)
    except Exception as error:
        return Finding("plugins", f"cannot be imported: {error!r:.300}", "reinstall editserver (make setup)")
    return Finding("plugins", "general and endpoint plugin visible to vLLM")


def demo_model() -> Finding:
    """The package with the demo model's weights."""
    from editserver.demo.model import INSTALL_COMMAND, DemoModelError, find_gguf

    try:
        return Finding("demo model", f"packaged as {find_gguf().name}")
    except DemoModelError as error:
        return Finding("demo model", str(error), INSTALL_COMMAND, warning=True)


def bundled_saes() -> Finding:
    """The dictionaries that ship with the package open and are what they say."""
    from sae_weights.catalogue import bundled, resolve
    from sae_weights.errors import SAEFormatError

    names = bundled()
    if not names:
        return Finding("SAEs", "no bundled dictionary", "reinstall editserver (make setup)", warning=True)
    try:
        shown = [f"{name} ({resolve(name)[1].n_features} latents)" for name in names]
    except SAEFormatError as error:
        return Finding("SAEs", str(error), "reinstall editserver (make setup)")
    return Finding("SAEs", ", ".join(shown))


def kv_space() -> Finding:
    """On a CPU the KV cache is ordinary memory."""
    gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES") / 2**30
    asked = os.environ.get("VLLM_CPU_KVCACHE_SPACE", "")
    wanted = float(asked) if asked.replace(".", "", 1).isdigit() else KV_GIB_ADVISED
    detail = f"{gib:.1f} GiB of memory are free" + (f", VLLM_CPU_KVCACHE_SPACE is {asked} GiB" if asked else "")
    if wanted + 2 > gib:
        mend = f"export VLLM_CPU_KVCACHE_SPACE={max(1, int(gib) - 2)}, or free memory"
        return Finding("memory", detail, mend, warning=gib > 3)
    return Finding("memory", detail)


def compiler() -> Finding:
    """torch.compile on a CPU builds C++: it needs a compiler and Python's headers."""
    found = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    headers = Path(sysconfig.get_paths()["include"]) / "Python.h"
    eager = "or serve with --enforce-eager"
    if found is None:
        return Finding("compiler", "no C++ compiler for torch.compile", f"apt install g++, {eager}", warning=True)
    if not headers.is_file():
        package = f"python3.{sys.version_info.minor}-dev"
        return Finding("compiler", f"{headers} is missing", f"apt install {package}, {eager}", warning=True)
    return Finding("compiler", found)


def cache_folder() -> Finding:
    """Where converted models and the library go."""
    from editserver.demo.model import cache_root

    root = cache_root()
    place = next(parent for parent in (root, *root.parents) if parent.exists())
    if not os.access(place, os.W_OK):
        return Finding("cache", f"{root} cannot be written", "export EDITSERVER_CACHE=/a/folder/of/yours")
    return Finding("cache", str(root))


def self_test() -> Finding:
    """A small engine in a process of its own answers plain, edited and plain again (see ``selftest``)."""
    try:
        done = subprocess.run(
            [sys.executable, "-m", "editserver.cli.selftest"], capture_output=True, text=True, timeout=SELFTEST_S
        )
    except subprocess.TimeoutExpired:
        return Finding("self-test", f"did not end within {SELFTEST_S} s", "see editserver serve demo --enforce-eager")
    lines = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
    if done.returncode == 0:
        return Finding("self-test", done.stdout.strip().splitlines()[-1])
    return Finding("self-test", "\n".join(lines[-12:]), "mend what is listed above; else report this")


CHECKS: tuple[Callable[[], Finding], ...] = (
    python_version,
    torch_build,
    vllm_build,
    plugins,
    demo_model,
    bundled_saes,
    kv_space,
    compiler,
    cache_folder,
)


def examine(selftest: bool = False, console: Console | None = None) -> int:
    """Run the checks and print them; 0 if a server can run here, else 1."""
    console = console or Console()
    table = Table(title="editserver doctor", title_justify="left")
    for column in ("", "what", "found", "mend"):
        table.add_column(column, overflow="fold")
    findings: list[Finding] = []
    with console.status("looking") as status:
        for check in (*CHECKS, *((self_test,) if selftest else ())):
            status.update(f"looking at {check.__name__.replace('_', ' ')}")
            findings.append(check())
    for finding in findings:
        mark = "[green]ok[/]" if not finding.mend else "[yellow]note[/]" if finding.ok else "[red]problem[/]"
        table.add_row(mark, finding.name, finding.detail, finding.mend)
    console.print(table)
    problems = sum(not finding.ok for finding in findings)
    if problems:
        console.print(f"{problems} to mend before a server can run here", style="red")
        return 1
    if not selftest:
        console.print(
            "A server can run here. `editserver doctor --selftest` proves it with a real edit.", style="green"
        )
    return 0
