"""The demo model with a few of its layers: for starts whose cost grows with the depth, and whose promise does not."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import load_file, save_file

from sae_weights.formats import Origin
from tests.engine.dictionaries import ARCHITECTURES, WHOLE, write_native, write_sae

KEPT = (0, 1, 15, 16, 28, 29)
"""Layers of the demo model, in their order."""


def write_shallow(model: Path, folder: Path) -> Path:
    """The checkpoint ``model`` with the layers ``KEPT`` alone."""
    shutil.copytree(model, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    tensors = {}
    for name, value in load_file(model / "model.safetensors").items():
        found = re.match(r"model\.layers\.(\d+)(\..+)", name)
        if found is None:
            tensors[name] = value
        elif int(found[1]) in KEPT:
            tensors[f"model.layers.{KEPT.index(int(found[1]))}{found[2]}"] = value
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": len(KEPT)}))
    return folder


def shallow_saes(root: Path) -> Mapping[str, Path | Origin]:
    """``{architecture}/l{layer}`` as for the whole demo model, at the place where its layer now is."""
    saes: dict[str, Path | Origin] = {
        f"{name}/l{layer}": write_sae(root / name / f"l{layer}", KEPT.index(layer), name, 576)
        for name in ARCHITECTURES
        for layer in (0, 15, 29)
    }
    return saes | {f"{name}/l15": write_native(root / name, KEPT.index(15), name, 576) for name in WHOLE}
