"""Qwen-Scope: one PyTorch file per layer, one config for all of them.

Layout::

    Qwen/SAE-Res-<model>-W<n/1024>K-L0_<k>/
        config.json         {"model_type": "topk_sae", "base_model", "d_model", "d_sae", "k", "hook_point": "resid_post", …}
        layerL.sae.pt       W_enc [n, d], b_enc [n], W_dec [d, n], b_dec [d]     float32; a state dict

TopK: ReLU, then the k largest of a token. b_dec is not subtracted from the input (sae-lens and the release's own demo
agree). The hook is the output of decoder layer L. Without config.json, k is read from the repository's name.

Source: arXiv:2605.11887 and huggingface.co/collections/Qwen/qwen-scope.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from sae_weights.errors import SAEFormatError
from sae_weights.sae import SAE

from .base import Format, Hints
from .fields import Fields
from .json_object import read_json_object
from .layout import Matrix, TensorRows
from .pickled import PickledFile

CONFIG_FILE = "config.json"
_LAYER_FILE = re.compile(r"layer(\d{1,3})\.sae\.pt")
_REPOSITORY = re.compile(r"SAE-Res-(.+)-W\d+K-L0_(\d{1,5})")


class QwenScope(Format):
    """See the module."""

    name = "qwen_scope"
    title = "Qwen-Scope"
    files = f"layerL.sae.pt (+ {CONFIG_FILE} beside it)"
    reference = "arXiv:2605.11887"
    architectures = ("topk",)

    def recognises(self, path: Path) -> bool:
        return bool(_LAYER_FILE.fullmatch(path.name)) if path.is_file() else bool(_layer_files(path))

    def open(self, path: Path, hints: Hints) -> SAE:
        weights = path if path.is_file() else self._chosen(path, hints)
        named = _LAYER_FILE.fullmatch(weights.name)
        place = weights.parent / CONFIG_FILE
        config = Fields(place, read_json_object(place) if place.exists() else {})
        if place.exists():
            config.choice("model_type", ("topk_sae",))
            config.choice("hook_point", ("resid_post",), default="resid_post")
        repository = _REPOSITORY.search("/".join(weights.absolute().parts))
        file = PickledFile(weights)
        source = TensorRows(
            file,
            encoder=Matrix("W_enc"),
            decoder=Matrix("W_dec", transposed=True),
            b_dec="b_dec",
            gate={"b_enc": "b_enc"},
            what="a Qwen-Scope dictionary",
        )
        _agree(config, "d_model", source.d_model, weights)
        _agree(config, "d_sae", source.n_features, weights)
        stated = f"blocks.{named[1]}.hook_resid_post" if named else None
        hook = self.hook(weights, hints, stated)
        return SAE(
            architecture="topk",
            hook=hook,
            source=source,
            k=_k(weights, config, hints, repository),
            metadata={"hook_name": hook.hook_name, **_model(config, repository)},
        )

    def _chosen(self, folder: Path, hints: Hints) -> Path:
        """The one layer's file in a folder; where there are several, the one of the given hook."""
        files = _layer_files(folder)
        if not files:
            raise SAEFormatError(f"{folder}: holds no layerL.sae.pt")
        if len(files) == 1:
            return next(iter(files.values()))
        if hints.hook is not None:
            layer = self.hook(folder, hints).edit_layer
            if layer in files:
                return files[layer]
        raise SAEFormatError(
            f"{folder}: holds dictionaries of {len(files)} layers; expected the file of one, e.g. "
            f"{folder / next(iter(files.values())).name}"
        )


def _layer_files(folder: Path) -> dict[int, Path]:
    try:
        found = [(match, entry) for entry in folder.iterdir() if (match := _LAYER_FILE.fullmatch(entry.name))]
    except OSError:
        return {}
    return {int(match[1]): entry for match, entry in sorted(found, key=lambda pair: int(pair[0][1]))}


def _agree(config: Fields, field: str, found: int, weights: Path) -> None:
    if field in config.content and config.count(field) != found:
        raise config.wrong(field, f"{found}, which is what {weights.name} has")


def _k(weights: Path, config: Fields, hints: Hints, repository: re.Match[str] | None) -> int:
    if "k" in config.content:
        k = config.count("k")
        if hints.k is not None and hints.k != k:
            raise config.wrong("k", f"{hints.k}, as given")
        return k
    if hints.k is not None:
        return hints.k
    if repository is not None and int(repository[2]) > 0:
        return int(repository[2])
    raise SAEFormatError(
        f"{weights}: no {CONFIG_FILE} beside it says how many latents a token keeps, nor does the name of its repository "
        "(…-L0_50); give k"
    )


def _model(config: Fields, repository: re.Match[str] | None) -> dict[str, Any]:
    model = config.content.get("base_model")
    if isinstance(model, str):
        return {"model_name": model}
    return {"model_name": f"Qwen/{repository[1]}"} if repository else {}
