"""Which files of a repository one dictionary needs: its weights, and the configuration beside and above them."""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Protocol

from sae_weights.errors import SAEFormatError

from .place import HubPath

WEIGHTS = (
    "sae_weights.safetensors",
    "sae_weights.pt",
    "params.npz",
    "params.safetensors",
    "sae.safetensors",
    "ae.pt",
    "sae.pt",
    "cc_weights.pt",
    "checkpoints/final.safetensors",
    "checkpoints/pruned.safetensors",
    "checkpoints/pruned.pt",
    "latest_ckpt.safetensors",
    "atoms.pt",
    "model.safetensors",
)
"""Names that published layouts give the weights in a dictionary's folder, the first that is there being meant."""

BESIDE = {"sae_weights.safetensors": ("activation_whitening.safetensors",), "atoms.pt": ("atom_indices.pt",)}
"""Further tensors that go with one of them."""

CONFIGS = (
    "cfg.json",
    "config.json",
    "config.yaml",
    "conf.yaml",
    "hyperparams.json",
    "metadata.yaml",
    "final_config.yaml",
    "wandb-config.yaml",
    "wanb-config.yaml",
    "activation_scaler.json",
    "sae.json",
    "editserver.json",
)
"""Configuration beside the weights or in a folder above: sparsify and circuit-tracer keep one per set of dictionaries."""

TOGETHER = re.compile(r"params_layer_\d+\.safetensors")
"""Files that are one dictionary together where they lie in one folder: Gemma Scope 2's crosscoders."""

TENSORS = (".safetensors", ".npz", ".pt", ".pth")


@dataclass(frozen=True)
class Listed:
    """A file of a repository and the hash that the Hub states for it: sha256 if it is a large one, else git's."""

    path: str
    sha256: str | None
    git_sha1: str | None


class Tree(Protocol):
    """One commit of a repository."""

    def kind(self, path: str) -> str | None:
        """``file``, ``folder`` or None."""
        ...

    def children(self, path: str) -> dict[str, Listed | None]:
        """Name → file, or None for a folder."""
        ...


@dataclass(frozen=True)
class Needed:
    """``load``: what the loader is given (a folder, or a file if the weights have no name of their own)."""

    load: str
    files: tuple[Listed, ...]


def needed(tree: Tree, where: HubPath) -> Needed:
    """The files of the dictionary at ``where.path``.

    Raises:
        SAEFormatError: nothing there, or several dictionaries, with the nearest names.
    """
    kind = tree.kind(where.path)
    if kind is None:
        raise _missing(tree, where)
    folder = where.path if kind == "folder" else _parent(where.path)
    here = tree.children(folder)
    if kind == "file":
        weights = [_file(here, PurePosixPath(where.path).name, where)]
        load = where.path
        weights += _partners(here, PurePosixPath(where.path).name)
    else:
        load, weights = _weights(tree, folder, here, where)
    stem = PurePosixPath(weights[0].path).stem
    files = {file.path: file for file in weights}
    for name, file in here.items():
        named_for_it = name.startswith(stem) and name.endswith((".json", ".yaml"))
        if file is not None and (name in CONFIGS or named_for_it):
            files[file.path] = file
    while folder:
        folder = _parent(folder)
        for name, file in tree.children(folder).items():
            if file is not None and name in CONFIGS:
                files[file.path] = file
    return Needed(load, tuple(files.values()))


def _weights(tree: Tree, folder: str, here: dict[str, Listed | None], where: HubPath) -> tuple[str, list[Listed]]:
    for name in WEIGHTS:
        sub, _, last = name.rpartition("/")
        if sub and (sub not in here or here[sub] is not None):
            continue
        inside = tree.children(f"{folder}/{sub}".strip("/")) if sub else here
        found = inside.get(last)
        if found is not None:
            others = [inside.get(other) for other in BESIDE.get(name, ())]
            return folder, [found, *(other for other in others if other is not None)]
    tensors = [file for name, file in here.items() if file is not None and name.endswith(TENSORS)]
    if len(tensors) == 1:
        return tensors[0].path, tensors
    if tensors and all(TOGETHER.fullmatch(PurePosixPath(file.path).name) for file in tensors):
        return folder, tensors
    names = sorted(PurePosixPath(file.path).name for file in tensors) or sorted(n for n, f in here.items() if f is None)
    shown = ", ".join(names[:6]) + (", …" if len(names) > 6 else "")
    if tensors:
        raise SAEFormatError(f"{where}: {len(tensors)} files of tensors; name one of {shown}")
    raise SAEFormatError(
        f"{where}: no dictionary in this folder; " + (f"below it: {shown}" if shown else "it is empty")
    )


def _file(here: dict[str, Listed | None], name: str, where: HubPath) -> Listed:
    found = here.get(name)
    if found is None:
        raise SAEFormatError(f"{where}: no such file")
    return found


def _partners(here: dict[str, Listed | None], name: str) -> list[Listed]:
    """Encoder and decoder of one layer of a cross-layer transcoder lie in two files."""
    if not name.startswith(("W_enc_", "W_dec_")):
        return []
    other = ("W_dec_" if name.startswith("W_enc_") else "W_enc_") + name[len("W_enc_") :]
    found = here.get(other)
    return [found] if found is not None else []


def _missing(tree: Tree, where: HubPath) -> SAEFormatError:
    folder = _parent(where.path)
    while folder and tree.kind(folder) != "folder":
        folder = _parent(folder)
    names = list(tree.children(folder))
    wanted = where.path.removeprefix(folder).strip("/").split("/")[0]
    near = difflib.get_close_matches(wanted, names, n=5, cutoff=0.4) or sorted(names)[:5]
    place = f"{where.repo}/{folder}".rstrip("/")
    shown = ", ".join(f"{folder}/{name}".strip("/") for name in near)
    return SAEFormatError(f"{where}: {place} has no {wanted!r}; nearest: {shown}")


def _parent(path: str) -> str:
    return "" if "/" not in path else path.rpartition("/")[0]
