"""SAELens folders (6.x; older configs too): cfg.json beside sae_weights.safetensors. Read lazily, written whole.

Tensors: W_enc (d, n), W_dec (n, d), b_dec (d); b_enc (n) [standard, topk, jumprelu]; threshold (n) [jumprelu]; b_gate,
b_mag, r_mag (n) [gated]; topk_threshold () [training checkpoints of BatchTopK]. Beside them may lie ``editserver.json``
(an object whose fields join the metadata: median_norm, max_activation …, and ``norm_scaling_factor``) and, in training
checkpoints, ``activation_scaler.json``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import save_file
from torch import Tensor

from sae_weights.architectures import ARCHITECTURES
from sae_weights.errors import SAEFormatError
from sae_weights.folding import Block, Folding
from sae_weights.input_norm import InputNorm
from sae_weights.sae import SAE
from sae_weights.source import Rows

from .base import Format, Hints
from .json_object import read_json_object
from .saelens_config import SCALED_INPUT, SAELensConfig, read_config, scale_field
from .tensor_file import TensorFile

CONFIG_FILE = "cfg.json"
WEIGHTS_FILE = "sae_weights.safetensors"
SIDECAR_FILE = "editserver.json"
SCALER_FILE = "activation_scaler.json"

# The first SAELens whose configs look like the ones written here.
_WRITTEN_VERSION = "6.54.12"
_WRITTEN_NAMES = {"relu": "standard", "batchtopk": "jumprelu"}
# Up to this size a strided encoder is read and transposed once instead of column by column.
_TRANSPOSE_BYTES = 256 << 20


class SAELens(Format):
    """See the module."""

    name = "saelens"
    title = "SAELens"
    files = f"{CONFIG_FILE} + {WEIGHTS_FILE}"
    reference = "github.com/decoderesearch/SAELens 6.54"
    architectures = ("relu", "jumprelu", "gated", "topk", "batchtopk")

    def recognises(self, path: Path) -> bool:
        # The last one asked: half a checkpoint is taken for one, so that the error names what is missing.
        return (path / CONFIG_FILE).is_file() or (path / WEIGHTS_FILE).exists()

    def open(self, path: Path, hints: Hints) -> SAE:
        return _open(path, hints.norm_scaling_factor)


def _open(folder: Path, norm_scaling_factor: float | None) -> SAE:
    config = read_config(folder / CONFIG_FILE)
    sidecar_path = folder / SIDECAR_FILE
    sidecar = read_json_object(sidecar_path) if sidecar_path.exists() else {}
    source = SAELensRows(TensorFile(folder / WEIGHTS_FILE), config)
    folding = Folding(
        input_scale=_input_scale(folder, config, sidecar, norm_scaling_factor),
        decoder_norm=config.rescale_acts_by_decoder_norm,
        subtract_b_dec=config.apply_b_dec_to_input,
    )
    norm = "none" if config.normalize_activations == SCALED_INPUT else config.normalize_activations
    try:
        return SAE(
            architecture=config.architecture,
            hook=config.hook,
            source=source,
            folding=folding,
            input_norm=cast(InputNorm, norm),
            k=config.k,
            metadata={**config.metadata, **sidecar},
        )
    except SAEFormatError as error:
        raise SAEFormatError(f"{folder}: {error}") from error


class SAELensRows:
    """Rows of a SAELens weights file. W_dec rows are contiguous on disk; W_enc is (d, n), so its rows are columns."""

    recorded_digest: str | None = None

    def __init__(self, file: TensorFile, config: SAELensConfig) -> None:
        self._file = file
        self.label = str(file.path)
        self.d_model, self.n_features = d, n = config.d_in, config.d_sae
        file.require("W_enc", [d, n])
        file.require("W_dec", [n, d])
        file.require("b_dec", [d])
        names = {"W_enc", "W_dec", "b_dec"}
        self._gate: dict[str, Tensor] = {}
        for name in ARCHITECTURES[config.architecture].gate_tensors:
            if name == "threshold" and config.architecture == "batchtopk":
                file.require("topk_threshold", [], [1])
                names.add("topk_threshold")
                self._gate[name] = file.tensor("topk_threshold").reshape(()).float().expand(n)
            else:
                file.require(name, [n])
                names.add(name)
                self._gate[name] = file.tensor(name)
        self._refuse_others(file, names, config)
        self.b_dec = file.tensor("b_dec")
        self.d_out = d
        self.extras: dict[str, Tensor] = {}
        self.gate_shapes: dict[str, tuple[int, ...]] = dict.fromkeys(self._gate, ())
        self._transposed: Tensor | None = None

    def read(self, rows: Rows) -> Block:
        chosen = rows if isinstance(rows, slice) else list(rows)
        gate = {name: vector[chosen] for name, vector in self._gate.items()}
        return Block(self._encoder_rows(chosen), self._file.rows("W_dec", chosen), gate)

    def release(self) -> None:
        self._transposed = None

    def _encoder_rows(self, rows: slice | list[int]) -> Tensor:
        transposed = self._transposed  # once: another thread may release it
        if transposed is None and self.d_model * self.n_features * 4 <= _TRANSPOSE_BYTES:
            transposed = self._transposed = self._file.tensor("W_enc").T.contiguous()
        if transposed is not None:
            return transposed[rows]
        return self._file.columns("W_enc", rows)

    @staticmethod
    def _refuse_others(file: TensorFile, known: set[str], config: SAELensConfig) -> None:
        for name in sorted(file.shapes.keys() - known):
            if name == "scaling_factor" and bool((file.tensor(name) == 1).all()):
                continue  # written, and meaningless, in releases before 6.0
            raise SAEFormatError(
                f"{file.path}: tensor {name!r} of shape {file.shapes[name]} does not belong to architecture "
                f"{config.stored_architecture!r}; expected {sorted(known)}"
            )


def _input_scale(folder: Path, config: SAELensConfig, sidecar: Mapping[str, Any], argument: float | None) -> float:
    if config.normalize_activations != SCALED_INPUT:
        if argument is not None:
            raise SAEFormatError(
                f"{folder / CONFIG_FILE}: norm_scaling_factor {argument} given, but normalize_activations is "
                f"{config.normalize_activations!r}; only {SCALED_INPUT!r} takes one"
            )
        return 1.0
    scaler_path = folder / SCALER_FILE
    scaler = read_json_object(scaler_path) if scaler_path.exists() else {}
    found = (
        scale_field(folder / CONFIG_FILE, {"norm_scaling_factor": argument}, "norm_scaling_factor")
        or scale_field(folder / SIDECAR_FILE, sidecar, "norm_scaling_factor")
        or scale_field(scaler_path, scaler, "scaling_factor")
    )
    if found is None:
        raise SAEFormatError(
            f"{folder / CONFIG_FILE}: field 'normalize_activations' is {SCALED_INPUT!r}, which scales inputs by a "
            f"constant that the checkpoint does not hold; give it as 'norm_scaling_factor' in {SIDECAR_FILE} beside it"
        )
    return found


def save_saelens(
    sae: SAE,
    path: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    metadata: Mapping[str, Any] | None = None,
    sidecar: Mapping[str, Any] | None = None,
) -> Path:
    """Write the canonical form of an SAE as a SAELens folder, readable here and by ``sae_lens.SAE.load_from_disk``.

    ``dtype`` (float32 or bfloat16) stores the two matrices; vectors stay float32, and so does the config's dtype:
    SAELens too then computes in fp32. ``metadata`` joins the config's metadata, ``sidecar`` becomes editserver.json.
    Returns the folder. A BatchTopK dictionary is written as jumprelu, as SAELens does. Raises ValueError for another
    dtype.
    """
    if dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(f"dtype {dtype}; expected torch.float32 or torch.bfloat16")
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    W_enc, W_dec = sae.W_enc.to(dtype), sae.W_dec.to(dtype)
    gate: Mapping[str, Tensor] = sae.gate
    if dtype is not torch.float32:
        # Rounding W_enc moves every pre-activation by ΔW·x. Inputs gather around b_dec: let the error vanish there.
        moved = (W_enc.double() - sae.W_enc.double()) @ sae.b_dec.double()
        gate = ARCHITECTURES[sae.architecture].shift_input({n: v.double() for n, v in gate.items()}, moved)
    tensors = {"W_enc": W_enc.T, "W_dec": W_dec, "b_dec": sae.b_dec, **{n: v.float() for n, v in gate.items()}}
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / WEIGHTS_FILE)
    trained_as = {"training_architecture": sae.architecture} if sae.architecture == "batchtopk" else {}
    own = {"sae_lens_version": _WRITTEN_VERSION, "hook_name": sae.hook.hook_name, **trained_as}
    config: dict[str, Any] = {
        "architecture": _WRITTEN_NAMES.get(sae.architecture, sae.architecture),
        "d_in": sae.d_model,
        "d_sae": sae.n_features,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": False,
        "normalize_activations": sae.input_norm,
        "reshape_activations": "hook_z" if own["hook_name"].endswith("hook_z") else "none",
        "metadata": {**_plain(sae.metadata), **_plain(metadata or {}), **own},
    }
    if sae.k is not None:
        config |= {"k": sae.k, "rescale_acts_by_decoder_norm": False}
    _write_json(folder / CONFIG_FILE, config)
    if sidecar is not None:
        _write_json(folder / SIDECAR_FILE, dict(sidecar))
    return folder


def _plain(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Metadata without the facts that belong to the checkpoint it came from and are folded by now."""
    return {name: value for name, value in metadata.items() if name not in ("hf_hook_name", "norm_scaling_factor")}


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")
