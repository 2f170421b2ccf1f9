"""Writes a dictionary as a SAELens folder: what SAELens can express, and nothing that it would read as something else."""

from __future__ import annotations

import json
from collections.abc import Mapping
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from sae_weights.architectures import ARCHITECTURES
from sae_weights.errors import SAEFormatError
from sae_weights.sae import SAE

CONFIG_FILE = "cfg.json"
WEIGHTS_FILE = "sae_weights.safetensors"
SIDECAR_FILE = "editserver.json"
# The first SAELens whose configs look like the ones written here.
_WRITTEN_VERSION = "6.54.12"
# Our kinds of function → SAELens' architectures, and what a transcoder with such latents is called.
_NAMES = {
    "relu": "standard",
    "jumprelu": "jumprelu",
    "gated": "gated",
    "topk": "topk",
    "abstopk": "abstopk",
    "matching_pursuit": "matching_pursuit",
}
_TRANSCODERS = {"relu": "transcoder", "jumprelu": "jumprelu_transcoder"}
_SKIP_TRANSCODERS = {"relu": "skip_transcoder", "jumprelu": "jumprelu_skip_transcoder"}
# Facts that belong to the checkpoint a dictionary came from and are folded by now.
_FOLDED = ("hf_hook_name", "hf_hook_name_out", "norm_scaling_factor", "matryoshka_widths")


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
    Returns the folder. Architectures of the same function share a name: BatchTopK is written as jumprelu, as SAELens
    does; the groups of a Matryoshka dictionary go into the metadata (``matryoshka_widths``). input_norm "centre" becomes
    ``model_from_pretrained_kwargs.center_writing_weights``, for SAELens the model that must be loaded. Raises ValueError
    for another dtype, and SAEFormatError, before anything is written, for a dictionary that SAELens cannot express.
    """
    if dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(f"dtype {dtype}; expected torch.float32 or torch.bfloat16")
    architecture = _architecture(sae)
    tensors = _tensors(sae, dtype, architecture)
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / WEIGHTS_FILE)
    own: dict[str, Any] = {"sae_lens_version": _WRITTEN_VERSION, "hook_name": sae.hook.hook_name}
    if sae.hook_out is not None:
        own["hook_name_out"] = sae.hook_out.hook_name
    if sae.architecture in ("batchtopk", "matryoshka"):
        trained_as = {"batchtopk": "batchtopk", "matryoshka": "matryoshka_batchtopk"}
        own["training_architecture"] = trained_as[sae.architecture]
    if sizes := sae.settings.get("group_sizes"):
        own["matryoshka_widths"] = list(accumulate(sizes))
    told = {**_plain(sae.metadata), **_plain(metadata or {})}
    centred = _centring(sae, told)
    config: dict[str, Any] = {
        "architecture": architecture,
        "d_in": sae.d_model,
        "d_sae": sae.n_features,
        "dtype": "float32",
        "device": "cpu",
        # Folded, except where there is no bias of the encoder to fold it into.
        "apply_b_dec_to_input": architecture == "matching_pursuit",
        "normalize_activations": "none" if sae.input_norm == "centre" else sae.input_norm,
        "reshape_activations": "hook_z" if own["hook_name"].endswith("hook_z") else "none",
        "metadata": {**told, **own, **centred},
    }
    if sae.hook_out is not None:
        config["d_out"] = sae.d_out
    if sae.k is not None:
        config |= {"k": sae.k, "rescale_acts_by_decoder_norm": False}
    if architecture == "matching_pursuit":
        for name in ("residual_threshold", "stop_on_duplicate_support"):
            config[name] = sae.settings[name]
        config["max_iterations"] = sae.settings["max_iterations"] or None
    _write_json(folder / CONFIG_FILE, config)
    if sidecar is not None:
        _write_json(folder / SIDECAR_FILE, dict(sidecar))
    return folder


def _architecture(sae: SAE) -> str:
    """SAELens' name of it; raises SAEFormatError naming what SAELens cannot express."""
    kind = ARCHITECTURES[sae.architecture].kind
    names = _NAMES
    if sae.hook_out is not None:
        names = _SKIP_TRANSCODERS if "W_skip" in sae.extras else _TRANSCODERS
    reason = ""
    if len(sae.hooks) > 1:
        reason = "a crosscoder"
    elif kind not in names:
        reason = f"architecture {sae.architecture!r}" + ("" if sae.hook_out is None else " in a transcoder")
    elif others := [name for name in sae.extras if name != "W_skip" or sae.hook_out is None]:
        reason = f"tensor {others[0]!r}"
    elif "rank_scale" in sae.gate:
        reason = "membership that is ranked in other units than the activation (rank_scale)"
    elif sae.input_norm == "unit_norm" or (sae.hook_out is not None and sae.input_norm != "none"):
        reason = f"input_norm {sae.input_norm!r}" + ("" if sae.hook_out is None else " in a transcoder")
    elif kind == "matching_pursuit" and not (sae.settings["rectify"] and torch.equal(sae.W_enc, sae.W_dec)):
        reason = "matching pursuit with signed coefficients or a folded input scale"
    if reason:
        raise SAEFormatError(
            f"{reason}: SAELens has nothing that computes this; `editserver sae import` writes every dictionary"
        )
    return names[kind]


def _tensors(sae: SAE, dtype: torch.dtype, architecture: str) -> dict[str, Tensor]:
    W_dec = sae.W_dec.to(dtype)
    if architecture == "matching_pursuit":
        return {"W_dec": W_dec, "b_dec": sae.b_dec}
    W_enc = sae.W_enc.to(dtype)
    gate: Mapping[str, Tensor] = sae.gate
    if dtype is not torch.float32 and sae.d_out == sae.d_model and sae.hook_out is None:
        # Rounding W_enc moves every pre-activation by ΔW·x. Inputs gather around b_dec: let the error vanish there.
        moved = (W_enc.double() - sae.W_enc.double()) @ sae.b_dec.double()
        gate = ARCHITECTURES[sae.architecture].shift_input({n: v.double() for n, v in gate.items()}, moved)
    vectors = {name: vector.float() for name, vector in gate.items()}
    return {"W_enc": W_enc.T, "W_dec": W_dec, "b_dec": sae.b_dec, **vectors, **sae.extras}


def _centring(sae: SAE, told: Mapping[str, Any]) -> dict[str, Any]:
    kwargs = told.get("model_from_pretrained_kwargs")
    known = dict(kwargs) if isinstance(kwargs, Mapping) else {}
    if sae.input_norm != "centre" and not known.get("center_writing_weights"):
        return {}
    # What is folded, or was never there, must not be asked of the model.
    return {"model_from_pretrained_kwargs": {**known, "center_writing_weights": sae.input_norm == "centre"}}


def _plain(metadata: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in metadata.items() if name not in _FOLDED}


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")
