"""The crosscoders of dictionary_learning's fork by science-of-finetuning: ae.pt or model.safetensors, and config.json.

Layout (L places, d values each)::

    encoder.weight [L, d, n], encoder.bias [n], decoder.weight [L, n, d], decoder.bias [L, d]
    code_normalization_id () int: 1 CROSSCODER, 2 SAE, 3 MIXED, 4 NONE, 5 DECOUPLED; older files lack it (CROSSCODER)
    target_rms (), activation_mean [L, d], activation_std [L, d], activation_global_scale [L]; newer files, NaN where unused
    BatchTopKCrossCoder: k () int32, threshold () fp32

The canonical input is the concatenation of the places, in their order: x [N, L·d]. No bias is subtracted from it.

Folded, and why:

- BatchTopKCrossCoder compares p_j · c_j with θ and keeps the value p_j; c_j is the code normalisation: Σ_l ‖d_lj‖
  (CROSSCODER), ‖(d_1j … d_Lj)‖ (SAE), α_sae · SAE + α_cc · CROSSCODER (MIXED, α from the config, 1 and 0.1 without), 1 (NONE).
  So threshold_j = θ / c_j. In a CrossCoder c_j weights the sparsity loss only.
- DECOUPLED has one θ and one activation per place and latent, which one latent here cannot be: refused.
- Normalised activations: x̃_l = (x_l − mean_l) · g_l, undone on the output with g_l + 1e-8.

Source: github.com/science-of-finetuning/dictionary_learning 173f7fa, dictionary.py (MIT). Minder et al. 2025, arXiv:2504.02922.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sae_weights.errors import SAEFormatError
from sae_weights.folding import Folding
from sae_weights.hook import Hook, parse_hook_name
from sae_weights.sae import SAE

from .base import Format, Hints
from .input_scale import constant_scale
from .nested_fields import NestedFields
from .tensors import Tensors, refuse_others, whole_number

CROSSCODERS = ("CrossCoder", "BatchTopKCrossCoder")
_CODE = {1: "CROSSCODER", 2: "SAE", 3: "MIXED", 4: "NONE", 5: "DECOUPLED"}
_NORMALISER = ("activation_mean", "activation_std", "activation_global_scale")
_KNOWN = {
    "encoder.weight",
    "encoder.bias",
    "decoder.weight",
    "decoder.bias",
    "code_normalization_id",
    "target_rms",
    "k",
    "threshold",
    *_NORMALISER,
}


def open_crosscoder(
    format: Format,
    weights: Path,
    file: Tensors,
    name: str,
    trainer: NestedFields,
    hints: Hints,
    metadata: dict[str, Any],
) -> SAE:
    """A CrossCoder or BatchTopKCrossCoder over the concatenated places."""
    refuse_others(file, _KNOWN, f"dictionary_learning's {name}")
    file.require("encoder.weight")
    shape = file.shapes["encoder.weight"]
    if len(shape) != 3 or 0 in shape:
        raise SAEFormatError(
            f"{file.path}: tensor 'encoder.weight' has shape {shape}; expected [places, d, n_features]"
        )
    places, d, n = shape
    file.require("encoder.bias", [n])
    file.require("decoder.weight", [places, n, d])
    file.require("decoder.bias", [places, d])
    if trainer.content.get("encoder_layers") not in (None, list(range(places))):
        raise trainer.wrong("encoder_layers", "null: an encoder over some of the places is not read")

    W_enc = file.tensor("encoder.weight").permute(2, 0, 1).double()
    W_dec = file.tensor("decoder.weight").permute(1, 0, 2).double()
    b_enc, b_dec = file.tensor("encoder.bias").double(), file.tensor("decoder.bias").double()
    gate: dict[str, Tensor] = {}
    if name == "BatchTopKCrossCoder":
        gate["threshold"] = _threshold(file, W_dec, trainer)
        metadata["k"] = whole_number(file, "k") if "k" in file.shapes else trainer.content.get("k")
    if (normaliser := _normaliser(file, places, d)) is not None:
        mean, g = normaliser
        W_enc = W_enc * g[:, None]
        b_enc = b_enc - torch.einsum("nld,ld->n", W_enc, mean)
        W_dec, b_dec = W_dec / (g[:, None] + 1e-8), b_dec / (g[:, None] + 1e-8) + mean
    hooks = concatenated_hooks(format, weights, trainer, places, hints)
    return SAE.from_tensors(
        label=str(file.path),
        architecture="batchtopk" if gate else "relu",
        hook=hooks[0],
        hooks=hooks,
        W_enc=W_enc.reshape(n, places * d).float(),
        W_dec=W_dec.reshape(n, places * d).float(),
        b_dec=b_dec.reshape(places * d).float(),
        gate={name: vector.float() for name, vector in {"b_enc": b_enc, **gate}.items()},
        folding=Folding(input_scale=constant_scale(weights, hints)),
        metadata=metadata,
    )


def concatenated_hooks(
    format: Format, weights: Path, trainer: NestedFields, places: int, hints: Hints, stated: str | None = None
) -> list[Hook]:
    """What each place is: the same hook of several models, or several layers.

    The hint may name them all, separated by commas. Otherwise ``layer`` of the config is one layer (of several models) or
    a list of them.
    """
    named = [name.strip() for name in (hints.hook or "").split(",") if name.strip()]
    if len(named) > 1:
        hooks = [hook for name in named if (hook := parse_hook_name(name)) is not None]
        if len(hooks) != len(named) or len(hooks) != places:
            raise SAEFormatError(f"hook: {hints.hook!r}; expected {places} hooks like 'blocks.15.hook_resid_post'")
        return hooks
    layer = trainer.content.get("layer")
    if isinstance(layer, list) and len(layer) == places and all(isinstance(one, int) for one in layer):
        return [Hook("resid_post", one) for one in layer]
    if stated is None and isinstance(layer, int):
        stated = Hook("resid_post", trainer.layer("layer")).hook_name
    return [format.hook(weights, replace(hints, hook=named[0] if named else None), stated)] * places


def _threshold(file: Tensors, W_dec: Tensor, trainer: NestedFields) -> Tensor:
    """θ / c_j [n], fp64."""
    number = whole_number(file, "code_normalization_id") if "code_normalization_id" in file.shapes else 1
    code = _CODE.get(number)
    if code is None or code == "DECOUPLED":
        raise SAEFormatError(
            f"{file.path}: tensor 'code_normalization_id' is {number}"
            + (" (DECOUPLED: each place has its own threshold and its own activation of every latent)" if code else "")
            + f"; expected one of {', '.join(f'{i} ({name})' for i, name in _CODE.items() if name != 'DECOUPLED')}"
        )
    file.require("threshold", [])
    each = W_dec.norm(dim=2)
    crosscoder, joint = each.sum(dim=1), each.square().sum(dim=1).sqrt()
    if code == "MIXED":
        weights = [trainer.content.get(f"code_normalization_alpha_{of}", default) for of, default in _ALPHAS.items()]
        if not all(isinstance(weight, int | float) for weight in weights):
            raise trainer.wrong("code_normalization_alpha_sae", "a number, as code_normalization_alpha_cc")
        norm = joint * weights[0] + crosscoder * weights[1]
    else:
        norm = {"CROSSCODER": crosscoder, "SAE": joint, "NONE": torch.ones_like(joint)}[code]
    # A latent that writes nothing anywhere measures 0, which is above θ only where θ is negative.
    theta = float(file.tensor("threshold"))
    silent = torch.full_like(norm, -1.0 if theta < 0 else torch.finfo(torch.float32).max)
    return torch.where(norm > 0, theta / norm.clamp(min=1e-30), silent)


_ALPHAS = {"sae": 1.0, "cc": 0.1}


def _normaliser(file: Tensors, places: int, d: int) -> tuple[Tensor, Tensor] | None:
    """mean [L, d] and g [L], fp64; None where the file has none or NaN."""
    present = [name for name in _NORMALISER if name in file.shapes]
    if not present:
        return None
    if len(present) != len(_NORMALISER):
        raise SAEFormatError(f"{file.path}: holds {present} of {list(_NORMALISER)}; expected all of them or none")
    file.require("activation_mean", [places, d])
    file.require("activation_std", [places, d])
    file.require("activation_global_scale", [places])
    mean = file.tensor("activation_mean").double()
    if bool(mean.isnan().any()) or bool(file.tensor("activation_std").isnan().any()):
        return None
    return mean, file.tensor("activation_global_scale").double()
