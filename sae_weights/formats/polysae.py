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
from .input_scale import PER_TOKEN, constant_scale
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
        for name, shape in {"W_enc": [d, n], "W_dec": [n, d], "b_enc": [n], "b_dec": [d]}.items():
            file.require(name, shape)
        metadata = fields.inside("metadata")
        gate, extras, settings = _decoder(file, fields, d, n)
        gate["b_enc"] = file.tensor("b_enc")
        if encoder == "poly_topk":
            settings["k"] = fields.count("k")
            if settings["k"] > n:
                raise fields.wrong("k", f"at most d_sae, {n}")
        else:
            gate["threshold"] = _threshold(file, encoder, n)
        _refuse_rescaling(file, fields, encoder)
        norm, scale = _norm(fields, hints)
        known = {"W_enc", "b_enc", "b_dec", "W_dec", "U1", "U2", "U3", "U_shared", "C1", "C2", "C3"}
        refuse_others(file, known | {"lambda2", "lambda3", "threshold", "topk_threshold"}, "PolySAE")
        return SAE.from_tensors(
            label=str(file.path),
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
    ranks = _ranks(file, d, n, shared)
    gate: dict[str, Tensor] = {}
    extras: dict[str, Tensor] = {}
    settings: dict[str, Any] = {}
    for i in range(1, order + 1):
        extras[f"C{i}"] = file.tensor(f"C{i}")
        if i == 1 and shared:
            file.require("U_shared", [n, ranks[0]])
            gate["U1"] = file.tensor("U_shared")
        elif not shared:
            gate[f"U{i}"] = file.tensor(f"U{i}")
        if i > 1:
            file.require(f"lambda{i}", [])
            settings[f"lambda{i}"] = float(file.tensor(f"lambda{i}"))
    return gate, extras, settings


def _ranks(file: TensorFile, d: int, n: int, shared: bool) -> list[int]:
    """R1, R2, R3, after the shapes of all C's and U's were checked: the orders that do not count are in the file too."""
    ranks: list[int] = []
    for i in (1, 2, 3):
        file.require(f"C{i}")
        shape = file.shapes[f"C{i}"]
        # A factor is cut to the rank of its product, so no rank is above those before it; of one U, not above its own.
        most = ranks[0 if shared else -1] if ranks else None
        if len(shape) != 2 or shape[0] != d or shape[1] < 1 or (most is not None and shape[1] > most):
            wanted = "R" if most is None else f"at most {most}"
            raise SAEFormatError(f"{file.path}: tensor 'C{i}' has shape {shape}; expected [{d}, {wanted}]")
        ranks.append(shape[1])
        file.require(f"U{i}", [n, shape[1]])
        if shared and bool((file.tensor(f"U{i}") != 0).any()):
            raise SAEFormatError(
                f"{file.path}: tensor 'U{i}' holds numbers, finite ones or not; expected zeros beside shared_u, "
                "where U_shared stands for all three"
            )
    return ranks


def _threshold(file: TensorFile, encoder: str, n: int) -> Tensor:
    if encoder == "poly_jumprelu":
        file.require("threshold", [n])
        return file.tensor("threshold")
    file.require("topk_threshold", [])
    return file.tensor("topk_threshold").float().expand(n)


def _refuse_rescaling(file: TensorFile, fields: NestedFields, encoder: str) -> None:
    if encoder == "poly_jumprelu" or not fields.flag("rescale_acts_by_decoder_norm", encoder != "poly_topk"):
        return
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
    why = PER_TOKEN if kind not in ("none", _SCALED_INPUT) else ""
    return ("none" if kind == _SCALED_INPUT else cast(InputNorm, kind)), constant_scale(
        fields.path, hints, unscalable=why
    )
