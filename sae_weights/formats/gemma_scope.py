"""Gemma Scope (Gemma 2): one numpy archive per dictionary, and nothing else; what it is stands in its path.

Layout::

    google/gemma-scope-{2b,9b,27b}-{pt,it}-{res,mlp,att,transcoders}/
        layer_L/width_W/average_l0_N/params.npz
        embedding/width_W/average_l0_N/params.npz                            (in the res repositories)

    W_enc [d, n], b_enc [n], threshold [n], W_dec [n, d], b_dec [d]          float32; in older uploads w_enc, w_dec

JumpReLU with a threshold per feature, compared strictly; b_dec is *not* subtracted from the input. Hooks: ``res`` the
residual stream after the layer, ``mlp`` the MLP's output after its norm, ``att`` the heads before the output projection
(concatenated), ``transcoders`` from the normalised input of the MLP, without the norm's gain, to the MLP's output.

Folded: the embedding dictionaries were trained on the rows of the embedding matrix, while the model's residual stream
before its first layer holds those rows times √d. x = √d · e, so input_scale is 1/√d; this scales b_dec too, which
sae-lens leaves as it is.

A folder outside such a tree does not say which site it is from; then the caller must name the hook.

Source: Lieberum et al. 2024, arXiv:2408.05147, and its tutorial.
"""

from __future__ import annotations

import re
from pathlib import Path

from sae_weights.errors import SAEFormatError
from sae_weights.folding import Folding
from sae_weights.hook import Hook
from sae_weights.sae import SAE

from .base import Format, Hints
from .layout import Matrix, TensorRows
from .npz import NpzFile

WEIGHTS_FILE = "params.npz"
_REPOSITORY = re.compile(r"gemma-scope-(\d+b)-(pt|it)-(res|mlp|att|transcoders)")
_LAYER = re.compile(r"layer_(\d{1,3})")
_POINTS = {"res": "resid_post", "mlp": "mlp_out", "att": "attn.z", "transcoders": "ln2.normalized"}


class GemmaScope(Format):
    """See the module."""

    name = "gemma_scope"
    title = "Gemma Scope"
    files = f".../layer_L/width_W/average_l0_N/{WEIGHTS_FILE}"
    reference = "arXiv:2408.05147"
    architectures = ("jumprelu",)

    def recognises(self, path: Path) -> bool:
        return path.name == WEIGHTS_FILE if path.is_file() else (path / WEIGHTS_FILE).is_file()

    def open(self, path: Path, hints: Hints) -> SAE:
        weights = path if path.is_file() else path / WEIGHTS_FILE
        file = NpzFile(weights)
        names = {f"W{name[1:]}" if name.startswith("w_") else name: name for name in file.shapes}
        source = TensorRows(
            file,
            encoder=Matrix(names.get("W_enc", "W_enc"), transposed=True),
            decoder=Matrix(names.get("W_dec", "W_dec")),
            b_dec="b_dec",
            gate={"b_enc": "b_enc", "threshold": "threshold"},
            what="a Gemma Scope dictionary",
        )
        place = weights.absolute().parts[-7:-1]
        found = _REPOSITORY.search("/".join(place))
        site = found[3] if found else None
        embedding = "embedding" in place
        hook = self._hook(weights, hints, site, "embed" if embedding else _layer(place))
        return SAE(
            architecture="jumprelu",
            hook=hook,
            hook_out=_hook_out(self, weights, hints, hook, site),
            source=source,
            folding=Folding(input_scale=source.d_model**-0.5 if embedding else 1.0),
            metadata={
                "hook_name": hook.hook_name,
                **({"model_name": _model_name(found[1], found[2])} if found else {}),
            },
        )

    def _hook(self, weights: Path, hints: Hints, site: str | None, layer: int | str | None) -> Hook:
        if layer == "embed" and hints.hook in (None, "hook_embed"):
            return Hook("resid_pre", 0)
        if hints.hook is not None:
            return self.hook(weights, hints)
        if isinstance(layer, int) and site is not None:
            return Hook(_POINTS[site], layer)
        raise SAEFormatError(
            f"{weights}: its path does not say which layer and site of Gemma it is from (a Gemma Scope repository does: "
            "gemma-scope-2b-pt-res/layer_20/…); name its hook, e.g. --hook blocks.20.hook_resid_post"
        )


def _layer(place: tuple[str, ...]) -> int | None:
    for part in reversed(place):
        if match := _LAYER.fullmatch(part):
            return int(match[1])
    return None


def _hook_out(form: Format, weights: Path, hints: Hints, hook: Hook, site: str | None) -> Hook | None:
    if hints.hook_out is not None:
        return form.hook(weights, Hints(hook=hints.hook_out))
    return Hook("mlp_out", hook.layer) if site == "transcoders" else None


def _model_name(size: str, kind: str) -> str:
    return f"google/gemma-2-{size}" + ("-it" if kind == "it" else "")
