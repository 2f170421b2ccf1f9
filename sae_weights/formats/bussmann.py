"""Bussmann's BatchTopK and matryoshka_sae repositories: a checkpoint folder of sae.pt and config.json.

Layout: config.json ``{sae_type, act_size d, dict_size n, top_k, input_unit_norm, hook_point, layer, model_name, group_sizes
(the text of a list), …}``; sae.pt a state dict, fp32::

    all           W_enc [d, n], b_enc [n], W_dec [n, d], b_dec [d]
    jumprelu      jumprelu.log_threshold [n]
    batch-topk, global-matryoshka-topk (matryoshka_sae)       threshold ()

Folded, and why:

- topk, batchtopk and matryoshka have a b_enc that their encode does not use: it is 0 here. vanilla and jumprelu use it.
- The encoder sees x̃ − b_dec, except in jumprelu.
- ``input_unit_norm`` is a layer norm per token, over the unbiased standard deviation + 1e-5, undone without the 1e-5.
- jumprelu's threshold is exp(log_threshold).
- matryoshka_sae evaluates with a running threshold. The first repository's batchtopk has none: it takes the k · B largest of
  a batch of B tokens, and a token of its own is a batch of one, so such a dictionary is a TopK. ``threshold`` of the hints
  stands in for it as for any TopK.

Sources: github.com/bartbussmann/BatchTopK b9aab1c, github.com/bartbussmann/matryoshka_sae c7c5787, sae.py and logs.py.
Bussmann et al. 2024, arXiv:2412.06410; 2025, arXiv:2503.17547.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sae_weights.errors import SAEFormatError
from sae_weights.folding import Folding
from sae_weights.sae import SAE

from .base import Format, Hints
from .input_scale import PER_TOKEN, constant_scale
from .json_object import read_json_object
from .layout import Matrix, TensorRows
from .nested_fields import NestedFields
from .pickled import PickledFile

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "sae.pt"
# sae_type → architecture, for a checkpoint with and one without a threshold of its own.
_TYPES = {
    "vanilla": ("relu", "relu"),
    "topk": ("topk", "topk"),
    "batchtopk": ("batchtopk", "topk"),
    "batch-topk": ("batchtopk", "topk"),
    "global-matryoshka-topk": ("matryoshka", "topk"),
    "jumprelu": ("jumprelu", "jumprelu"),
}


class Bussmann(Format):
    """See the module."""

    name = "bussmann"
    title = "Bussmann's BatchTopK and matryoshka_sae"
    files = f"{WEIGHTS_FILE} + {CONFIG_FILE} (sae_type, act_size, dict_size)"
    reference = "github.com/bartbussmann/BatchTopK, github.com/bartbussmann/matryoshka_sae"
    architectures = ("relu", "topk", "batchtopk", "matryoshka", "jumprelu")

    def recognises(self, path: Path) -> bool:
        return sae_type(path) is not None

    def open(self, path: Path, hints: Hints) -> SAE:
        fields, file = read_checkpoint(path)
        kind = fields.choice("sae_type", list(_TYPES))
        n = fields.count("dict_size")
        gate: dict[str, str | Tensor] = {"b_enc": "b_enc"} if kind in ("vanilla", "jumprelu") else unused_bias(n)
        settings: dict[str, Any] = {}
        known = ["b_enc"]
        if kind == "jumprelu":
            file.require("jumprelu.log_threshold", [n])
            gate["threshold"] = file.tensor("jumprelu.log_threshold").double().exp()
            known.append("jumprelu.log_threshold")
        elif "threshold" in file.shapes and kind not in ("vanilla", "topk"):
            file.require("threshold", [])
            gate["threshold"] = file.tensor("threshold").expand(n)
            known.append("threshold")
        normed = fields.flag("input_unit_norm", False)
        architecture = _TYPES[kind]["threshold" not in gate]
        if architecture == "matryoshka":
            settings["group_sizes"] = fields.counts("group_sizes")
        k = fields.count("top_k") if "topk" in kind else None
        if k is not None and hints.k not in (None, k):
            raise SAEFormatError(f"{fields.path}: field 'top_k' is {k} and the given k is {hints.k}; expected the same")
        return SAE(
            architecture=architecture,
            hook=self.hook(path, hints, fields.text("hook_point", "")),
            source=TensorRows(
                file,
                encoder=Matrix("W_enc", transposed=True),
                decoder=Matrix("W_dec"),
                b_dec="b_dec",
                gate=gate,
                ignore=known,
                what=f"a {kind!r} checkpoint",
            ),
            folding=Folding(
                input_scale=constant_scale(path, hints, unscalable=PER_TOKEN if normed else ""),
                subtract_b_dec=kind != "jumprelu",
            ),
            input_norm="layer_norm" if normed else "none",
            k=k if architecture == "topk" else None,
            settings=settings,
            metadata=describe(fields),
        )


def sae_type(path: Path) -> str | None:
    """What the config of such a checkpoint (folder, or sae.pt) calls it; None where there is no such config."""
    weights, config = _files(path)
    try:
        content = read_json_object(config)
        if not {"sae_type", "act_size", "dict_size"} <= content.keys() or not weights.is_file():
            return None
        return str(content["sae_type"])
    except (SAEFormatError, OSError):
        return None


def read_checkpoint(path: Path) -> tuple[NestedFields, PickledFile]:
    """Config and tensors, the matrices of the shapes that the config says."""
    weights, config = _files(path)
    fields, file = NestedFields(config, read_json_object(config)), PickledFile(weights)
    d, n = fields.count("act_size"), fields.count("dict_size")
    for name, shape in {"W_enc": [d, n], "W_dec": [n, d], "b_enc": [n], "b_dec": [d]}.items():
        file.require(name, shape)
    return fields, file


def unused_bias(n: int) -> dict[str, str | Tensor]:
    """The gate of an encoder that leaves its b_enc out."""
    return {"b_enc": torch.zeros(n)}


def describe(fields: NestedFields) -> dict[str, Any]:
    """What is worth keeping of the config."""
    kept = {"model_name": "model_name", "context_size": "seq_len", "dataset_path": "dataset_path", "k": "top_k"}
    found = {name: fields.content.get(theirs) for name, theirs in {**kept, "sae_type": "sae_type"}.items()}
    return {name: value for name, value in found.items() if isinstance(value, str | int)}


def _files(path: Path) -> tuple[Path, Path]:
    folder = path if path.is_dir() else path.parent
    return (path / WEIGHTS_FILE if path.is_dir() else path), folder / CONFIG_FILE
