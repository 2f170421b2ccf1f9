"""editserver's own layout: feature-major, canonical, memory-mapped. What ``editserver sae import`` writes.

A folder of sae.json (what it is, where it came from) and sae.safetensors: W_enc [n, d_in] (absent where the decoder is
the encoder), W_dec [n, d_out], b_dec [d_out], gate.NAME [n] or [n, r], extra.NAME. Row j of a matrix is contiguous on
disk, so opening reads the header and the vectors, and an edit of a feature its own two rows. The digest stands in the
safetensors header, beside the weights that it names: it is not computed again at every start (``sae inspect --verify``
does). Matrices are float32, or bfloat16 where that loses nothing or was asked for.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from sae_weights.architectures import ARCHITECTURES
from sae_weights.checks import check_names
from sae_weights.errors import SAEFormatError
from sae_weights.hook import Hook, parse_hook_name
from sae_weights.input_norm import INPUT_NORMS
from sae_weights.sae import SAE

from .base import Format, Hints
from .fields import shown
from .json_object import read_json_object
from .layout import Matrix, TensorRows
from .tensor_file import TensorFile

CONFIG_FILE = "sae.json"
WEIGHTS_FILE = "sae.safetensors"
SIDECAR_FILE = "editserver.json"
VERSION = 1
_DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16"}


class Native(Format):
    """See the module."""

    name = "editserver"
    title = "editserver (sae import)"
    files = "sae.json + sae.safetensors"
    reference = "sae_weights/formats/native.py"
    architectures = tuple(name for name, form in ARCHITECTURES.items() if form.execution != "sequence")

    def recognises(self, path: Path) -> bool:
        return (path / CONFIG_FILE).is_file() and (path / WEIGHTS_FILE).is_file()

    def open(self, path: Path, hints: Hints) -> SAE:
        place = path / CONFIG_FILE
        config = read_json_object(place)
        if config.get("format") != "editserver-sae" or config.get("version") != VERSION:
            raise SAEFormatError(
                f"{place}: field 'format'/'version' is {shown(config.get('format'))} {shown(config.get('version'))}; "
                f"expected 'editserver-sae' {VERSION}"
            )
        architecture = config.get("architecture")
        if not isinstance(architecture, str) or architecture not in ARCHITECTURES:
            raise SAEFormatError(
                f"{place}: field 'architecture' is {shown(architecture)}; expected one of {', '.join(sorted(ARCHITECTURES))}"
            )
        file = TensorFile(path / WEIGHTS_FILE)
        gate = {name.removeprefix("gate."): name for name in file.shapes if name.startswith("gate.")}
        extras = {name.removeprefix("extra."): name for name in file.shapes if name.startswith("extra.")}
        try:
            check_names(ARCHITECTURES[architecture], gate, extras)
        except SAEFormatError as error:
            raise SAEFormatError(f"{file.path}: {error}") from error
        source = TensorRows(
            file,
            encoder=Matrix("W_enc") if "W_enc" in file.shapes else None,
            decoder=Matrix("W_dec"),
            b_dec="b_dec",
            gate=gate,
            extras=extras,
            what="a dictionary that editserver wrote",
        )
        if "W_enc" not in file.shapes and not ARCHITECTURES[architecture].tied:
            raise SAEFormatError(f"{file.path}: no tensor 'W_enc'; architecture {architecture!r} has an encoder")
        source.recorded_digest = _digest(file)
        hooks = [_hook(place, "hooks", name) for name in _list(place, config, "hooks")]
        hook_out = config.get("hook_out")
        k = config.get("k")
        settings = config.get("settings") or {}
        metadata = config.get("metadata") or {}
        norm = config.get("input_norm", "none")
        if not isinstance(settings, dict) or not isinstance(metadata, dict):
            raise SAEFormatError(f"{place}: fields 'settings' and 'metadata' are objects")
        if norm not in INPUT_NORMS:
            raise SAEFormatError(
                f"{place}: field 'input_norm' is {shown(norm)}; expected one of {', '.join(INPUT_NORMS)}"
            )
        if k is not None and (not isinstance(k, int) or isinstance(k, bool)):
            raise SAEFormatError(f"{place}: field 'k' is {shown(k)}; expected a whole number")
        sidecar = read_json_object(path / SIDECAR_FILE) if (path / SIDECAR_FILE).exists() else {}
        return SAE(
            architecture=architecture,
            hook=hooks[0],
            hooks=hooks,
            hook_out=None if hook_out is None else _hook(place, "hook_out", hook_out),
            source=source,
            input_norm=norm,
            k=k,
            settings=settings,
            metadata={**metadata, **sidecar, **({"provenance": p} if (p := config.get("provenance")) else {})},
        )


def save_native(
    sae: SAE,
    path: str | Path,
    *,
    dtype: torch.dtype | None = None,
    metadata: Mapping[str, Any] | None = None,
    provenance: Mapping[str, Any] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Write the canonical form of ``sae`` as a folder that loads by row; returns the folder.

    Streams block by block: at no time is more than a block of rows in memory beside what ``sae`` holds. ``dtype`` stores
    the matrices; None takes bfloat16 where every canonical value is one, float32 otherwise (one more pass over the
    rows). ``progress`` is called with (rows done, rows in all passes). Raises ValueError for another dtype.
    """
    if dtype is not None and dtype not in _DTYPES:
        raise ValueError(f"dtype {dtype}; expected torch.float32 or torch.bfloat16")
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    passes = 3 if dtype is None else 2
    done = 0

    def tick(rows: int) -> None:
        nonlocal done
        done += rows
        if progress is not None:
            progress(done, passes * sae.n_features)

    if dtype is None:
        dtype = _narrowest(sae, tick)
    layout = _layout(sae, dtype)
    weights = folder / WEIGHTS_FILE
    partial = folder / f".{WEIGHTS_FILE}.partial"
    with partial.open("wb") as file:
        starts = _write_header(file, layout, "0" * 64)
        _write_tensors(file, starts, sae, dtype, tick)
    # The digest is of what was written: storing bfloat16 rounds.
    digest = _opened(sae, partial).compute_digest()
    tick(sae.n_features)
    with partial.open("r+b") as named:
        _write_header(named, layout, digest)
        named.flush()
        os.fsync(named.fileno())
    os.replace(partial, weights)
    config: dict[str, Any] = {
        "format": "editserver-sae",
        "version": VERSION,
        "architecture": sae.architecture,
        "hooks": [hook.hook_name for hook in sae.hooks],
        "hook_out": None if sae.hook_out is None else sae.hook_out.hook_name,
        "d_in": sae.d_model,
        "d_out": sae.d_out,
        "n_features": sae.n_features,
        "input_norm": sae.input_norm,
        "k": sae.k,
        "settings": dict(sae.settings),
        "digest": digest,
        "metadata": _plain({**sae.metadata, **(metadata or {})}),
        "provenance": dict(provenance or sae.metadata.get("provenance") or {}),
    }
    text = json.dumps(config, indent=2, ensure_ascii=False, allow_nan=False, default=str)
    (folder / CONFIG_FILE).write_text(text + "\n", encoding="utf-8")
    return folder


def _opened(sae: SAE, weights: Path) -> SAE:
    """The dictionary over the tensors just written, before its config exists."""
    file = TensorFile(weights)
    source = TensorRows(
        file,
        encoder=Matrix("W_enc") if "W_enc" in file.shapes else None,
        decoder=Matrix("W_dec"),
        b_dec="b_dec",
        gate={name.removeprefix("gate."): name for name in file.shapes if name.startswith("gate.")},
        extras={name.removeprefix("extra."): name for name in file.shapes if name.startswith("extra.")},
    )
    return SAE(
        architecture=sae.architecture,
        hook=sae.hook,
        hooks=sae.hooks,
        hook_out=sae.hook_out,
        source=source,
        input_norm=sae.input_norm,
        k=sae.k,
        settings=sae.settings,
    )


def _narrowest(sae: SAE, tick: Callable[[int], None]) -> torch.dtype:
    narrow = True
    for rows, block in sae.blocks():
        for matrix in (block.W_enc, block.W_dec):
            narrow = narrow and bool((matrix.bfloat16().float() == matrix).all())
        tick(rows.stop - rows.start)
    return torch.bfloat16 if narrow else torch.float32


def _layout(sae: SAE, dtype: torch.dtype) -> dict[str, tuple[str, list[int]]]:
    """Name → (stored dtype, shape), in file order: matrices last, so that vectors lie together."""
    n, stored = sae.n_features, _DTYPES[dtype]
    probe = sae.read([0])
    layout: dict[str, tuple[str, list[int]]] = {"b_dec": ("F32", [sae.d_out])}
    layout |= {f"extra.{name}": ("F32", list(tensor.shape)) for name, tensor in sae.extras.items()}
    layout |= {f"gate.{name}": ("F32", [n, *tensor.shape[1:]]) for name, tensor in probe.gate.items()}
    if not ARCHITECTURES[sae.architecture].tied or probe.W_enc is not probe.W_dec:
        layout["W_enc"] = (stored, [n, sae.d_model])
    layout["W_dec"] = (stored, [n, sae.d_out])
    return layout


def _write_header(file: BinaryIO, layout: Mapping[str, tuple[str, list[int]]], digest: str) -> dict[str, int]:
    """Write safetensors' header for ``layout``; returns where each tensor starts in the file."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt", "digest": digest}}
    at = 0
    for name, (stored, shape) in layout.items():
        size = (2 if stored == "BF16" else 4) * _product(shape)
        header[name] = {"dtype": stored, "shape": shape, "data_offsets": [at, at + size]}
        at += size
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 64)  # rows start aligned
    file.seek(0)
    file.write(struct.pack("<Q", len(encoded)) + encoded)
    data = 8 + len(encoded)
    return {name: data + header[name]["data_offsets"][0] for name in layout}


def _write_tensors(
    file: BinaryIO, starts: Mapping[str, int], sae: SAE, dtype: torch.dtype, tick: Callable[[int], None]
) -> None:
    for name, tensor in {"b_dec": sae.b_dec, **{f"extra.{n}": t for n, t in sae.extras.items()}}.items():
        file.seek(starts[name])
        file.write(_bytes(tensor.float()))
    for rows, block in sae.blocks():
        parts: dict[str, Tensor] = {f"gate.{name}": tensor.float() for name, tensor in block.gate.items()}
        parts["W_dec"] = block.W_dec.to(dtype)
        if "W_enc" in starts:
            parts["W_enc"] = block.W_enc.to(dtype)
        for name, tensor in parts.items():
            data = _bytes(tensor)
            file.seek(starts[name] + rows.start * (len(data) // len(tensor)))
            file.write(data)
        tick(rows.stop - rows.start)


def _bytes(tensor: Tensor) -> bytes:
    flat = tensor.detach().contiguous()
    values: bytes = flat.view(torch.int16 if flat.dtype is torch.bfloat16 else torch.int32).numpy().tobytes()
    return values


def _product(shape: list[int]) -> int:
    total = 1
    for extent in shape:
        total *= extent
    return total


def _plain(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Metadata without the facts that belong to the checkpoint it came from and are folded by now."""
    dropped = ("hf_hook_name", "norm_scaling_factor", "provenance")
    return {name: value for name, value in metadata.items() if name not in dropped}


def _digest(file: TensorFile) -> str | None:
    """The digest that the header records, if it does; anything else in its place would go where digests go."""
    digest = file.metadata.get("digest")
    if digest is None:
        return None
    if len(digest) != 64 or not set(digest) <= set("0123456789abcdef"):
        raise SAEFormatError(f"{file.path}: metadata 'digest' is {shown(digest)}; expected 64 hexadecimal digits")
    return digest


def _list(place: Path, config: Mapping[str, Any], field: str) -> list[Any]:
    value = config.get(field)
    if not isinstance(value, list) or not value:
        raise SAEFormatError(f"{place}: field {field!r} is {shown(value)}; expected a list of hook names")
    return value


def _hook(place: Path, field: str, name: Any) -> Hook:
    hook = parse_hook_name(name) if isinstance(name, str) else None
    if hook is None:
        raise SAEFormatError(
            f"{place}: field {field!r} holds {shown(name)}; expected a hook like 'blocks.15.hook_resid_post'"
        )
    return hook
