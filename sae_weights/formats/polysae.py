"""PolySAE (pakoromilas/PolySAE): a folder of its SAELens fork, cfg.json beside sae_weights.safetensors.

Layout: SAELens' fields and tensors, with ``architecture`` poly_topk | poly_jumprelu | poly_batchtopk | poly_matryoshka (the
last two are training checkpoints), poly_order 1..3, poly_rank or poly_ranks, shared_u; fp32::

    W_enc [d, n], b_enc [n], b_dec [d], W_dec [n, d] (kept for SAELens' interface: the decoder does not read it)
    C1 [d, R1], C2 [d, R2], C3 [d, R3], lambda2 (), lambda3 ()
    U1 [n, R1], U2 [n, R2], U3 [n, R3], or with shared_u U_shared [n, R1] (U1..U3 are then zeros without meaning)
    threshold [n] (poly_jumprelu), topk_threshold () (training checkpoints)

Terms above poly_order are in the file as zeros and are left out here.

Folded, and why:

- The encoder sees x̃ − b_dec where ``apply_b_dec_to_input`` says so (SAELens' default).
- ``normalize_activations`` expected_average_only_in: a constant that the folder does not hold; with it C1, C2, C3 and b_dec
  are divided by it, as the fork's own folding does.
- W_dec becomes the linear directions U1 · C1ᵀ, what a latent writes on its own to first order.
- ``rescale_acts_by_decoder_norm`` ranks by the norm of the unread W_dec in the fork's inference class and by that of the
  whole polynomial in its training class: read only where it changes nothing, W_dec having rows of norm 1.

Source: github.com/pakoromilas/PolySAE, sae_lens/saes/polysae.py (MIT). Koromilas et al. 2026, arXiv:2602.01322.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from sae_weights.errors import SAEFormatError
from sae_weights.folding import Folding
from sae_weights.input_norm import InputNorm
from sae_weights.sae import SAE

from .base import Format, Hints
from .json_object import read_json_object
from .nested_fields import NestedFields
from .tensor_file import TensorFile
from .tensors import refuse_others

CONFIG_FILE = "cfg.json"
WEIGHTS_FILE = "sae_weights.safetensors"
ENCODERS = ("poly_topk", "poly_jumprelu", "poly_batchtopk", "poly_matryoshka")
_SCALED_INPUT = "expected_average_only_in"
_NORMS = ("none", _SCALED_INPUT, "constant_norm_rescale", "layer_norm")


class PolySAEFolder(Format):
    """See the module."""

    name = "polysae"
    title = "PolySAE"
    files = f"{CONFIG_FILE} (architecture poly_…) + {WEIGHTS_FILE}"
    reference = "github.com/pakoromilas/PolySAE"
    architectures = ("polysae",)

    def recognises(self, path: Path) -> bool:
        if not (path / CONFIG_FILE).is_file():
            return False
        try:
            return str(read_json_object(path / CONFIG_FILE).get("architecture")).startswith("poly_")
        except (SAEFormatError, OSError):
            return False

    def open(self, path: Path, hints: Hints) -> SAE:
        fields = NestedFields(path / CONFIG_FILE, read_json_object(path / CONFIG_FILE))
        encoder = fields.choice("architecture", ENCODERS)
        file = TensorFile(path / WEIGHTS_FILE)
        d, n = fields.count("d_in"), fields.count("d_sae")
        file.require("W_enc", [d, n])
        file.require("b_enc", [n])
        file.require("b_dec", [d])
        metadata = fields.inside("metadata")
        gate, extras, settings = _decoder(file, fields, d, n)
        gate["b_enc"] = file.tensor("b_enc")
        if encoder == "poly_topk":
            settings["k"] = fields.count("k")
            if settings["k"] > n:
                raise fields.wrong("k", f"at most d_sae, {n}")
        else:
            gate["threshold"] = _threshold(file, encoder, n)
        _refuse_rescaling(file, fields, encoder, n, d)
        norm, scale = _norm(fields, hints)
        known = {"W_enc", "b_enc", "b_dec", "W_dec", "U1", "U2", "U3", "U_shared", "C1", "C2", "C3"}
        refuse_others(file, known | {"lambda2", "lambda3", "threshold", "topk_threshold"}, "PolySAE")
        return SAE.from_tensors(
            architecture="polysae",
            hook=self.hook(path, hints, metadata.text("hook_name", "")),
            W_enc=file.tensor("W_enc").T.contiguous(),
            W_dec=(gate["U1"].double() @ extras["C1"].double().T).float(),
            b_dec=file.tensor("b_dec"),
            gate=gate,
            extras=extras,
            folding=Folding(input_scale=scale, subtract_b_dec=fields.flag("apply_b_dec_to_input", True)),
            input_norm=norm,
            settings=settings,
            metadata={**metadata.content, "encoder": encoder.removeprefix("poly_")},
        )


def _decoder(
    file: TensorFile, fields: NestedFields, d: int, n: int
) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Any]]:
    """U's [n, R], C's [d, R] and λ's of the orders that count."""
    order = fields.count("poly_order", 3)
    if order > 3:
        raise fields.wrong("poly_order", "1, 2 or 3")
    shared = fields.flag("shared_u", False)
    gate: dict[str, Tensor] = {}
    extras: dict[str, Tensor] = {}
    settings: dict[str, Any] = {}
    before: int | None = None
    for i in range(1, order + 1):
        core = f"C{i}"
        file.require(core)
        shape = file.shapes[core]
        if len(shape) != 2 or shape[0] != d or shape[1] < 1 or (before is not None and shape[1] > before):
            wanted = "R" if before is None else f"at most {before}"
            raise SAEFormatError(f"{file.path}: tensor {core!r} has shape {shape}; expected [{d}, {wanted}]")
        rank = shape[1]
        before = before if shared and before is not None else rank
        extras[core] = file.tensor(core)
        if i == 1 or not shared:
            factor = "U_shared" if shared else f"U{i}"
            file.require(factor, [n, rank])
            gate[f"U{i}"] = file.tensor(factor)
        if i > 1:
            file.require(f"lambda{i}", [])
            settings[f"lambda{i}"] = float(file.tensor(f"lambda{i}"))
    return gate, extras, settings


def _threshold(file: TensorFile, encoder: str, n: int) -> Tensor:
    if encoder == "poly_jumprelu":
        file.require("threshold", [n])
        return file.tensor("threshold")
    file.require("topk_threshold", [])
    return file.tensor("topk_threshold").float().expand(n)


def _refuse_rescaling(file: TensorFile, fields: NestedFields, encoder: str, n: int, d: int) -> None:
    if encoder == "poly_jumprelu" or not fields.flag("rescale_acts_by_decoder_norm", encoder != "poly_topk"):
        return
    file.require("W_dec", [n, d])
    norms = file.tensor("W_dec").double().norm(dim=1)
    if encoder != "poly_topk" or not torch.allclose(norms, torch.ones_like(norms), atol=1e-5):
        raise fields.wrong(
            "rescale_acts_by_decoder_norm",
            "false: the norm that counts differs between the training and the inference code of PolySAE",
        )


def _norm(fields: NestedFields, hints: Hints) -> tuple[InputNorm, float]:
    kind = fields.choice("normalize_activations", _NORMS, "none")
    if kind == _SCALED_INPUT and hints.norm_scaling_factor is None:
        raise fields.wrong("normalize_activations", "'none', or a norm_scaling_factor: the folder does not hold it")
    return ("none" if kind == _SCALED_INPUT else cast(InputNorm, kind)), hints.norm_scaling_factor or 1.0
