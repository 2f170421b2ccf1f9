"""ITDA (pleask/itda): a run's folder of atoms.pt, atom_indices.pt and metadata.yaml.

Layout::

    atoms.pt          one tensor [n, d], fp32: activations that training chose, rows of norm 1
    atom_indices.pt   one tensor [n, 2] int64: (sequence, token) that each atom came from; not needed to encode
    metadata.yaml     {k (40 where absent), layer, lm_name, activation_dim, dataset, seq_len, loss_threshold, …}

Nothing is folded: encoder and decoder are the atoms, and there is no bias. Every run is trained on resid_post(layer).
Folders of the repository's first months say ``l0`` instead of ``k``; their code solved for the coefficients (orthogonal
matching pursuit) instead of subtracting one atom at a time: refused.

Source: the repository's train.py, ``class ITDA`` and ``mp_encode``. Leask et al. 2025, arXiv:2505.17769.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from sae_weights.errors import SAEFormatError
from sae_weights.hook import Hook
from sae_weights.sae import SAE

from .base import Format, Hints
from .input_scale import constant_scale
from .nested_fields import NestedFields
from .pickled import load_pickled
from .yaml_config import read_yaml_object

ATOMS_FILE = "atoms.pt"
INDICES_FILE = "atom_indices.pt"
CONFIG_FILE = "metadata.yaml"
DEFAULT_K = 40


class ITDADictionary(Format):
    """See the module."""

    name = "itda"
    title = "ITDA"
    files = f"{ATOMS_FILE} + {CONFIG_FILE}"
    reference = "github.com/pleask/itda"
    architectures = ("itda",)

    def recognises(self, path: Path) -> bool:
        return (path / ATOMS_FILE).is_file()

    def open(self, path: Path, hints: Hints) -> SAE:
        fields = NestedFields(path / CONFIG_FILE, read_yaml_object(path / CONFIG_FILE))
        if "l0" in fields.content and "k" not in fields.content:
            raise fields.wrong(
                "l0", "'k' instead: runs that say l0 were decomposed by orthogonal matching pursuit, which is not read"
            )
        k = fields.count("k", DEFAULT_K)
        if hints.k not in (None, k):
            raise SAEFormatError(f"{fields.path}: field 'k' is {k} and the given k is {hints.k}; expected the same")
        constant_scale(path, hints, unscalable="ITDA encodes activations as they are")
        atoms = _tensor(path / ATOMS_FILE)
        if atoms.ndim != 2 or 0 in atoms.shape or not atoms.is_floating_point():
            raise SAEFormatError(
                f"{path / ATOMS_FILE}: a tensor of shape {list(atoms.shape)} and {atoms.dtype}; expected numbers [n, d]"
            )
        n, d = atoms.shape
        if d != fields.count("activation_dim", d):
            raise fields.wrong("activation_dim", f"{d}, the width of {ATOMS_FILE}")
        if (path / INDICES_FILE).is_file():
            indices = _tensor(path / INDICES_FILE)
            if indices.shape != (n, 2) or indices.is_floating_point() or indices.is_complex():
                raise SAEFormatError(
                    f"{path / INDICES_FILE}: a tensor of shape {list(indices.shape)} and {indices.dtype}; "
                    f"expected whole numbers {[n, 2]}"
                )
        stated = Hook("resid_post", fields.layer("layer")).hook_name if "layer" in fields.content else None
        kept = {"model_name": "lm_name", "dataset_path": "dataset", "context_size": "seq_len"}
        metadata = {name: fields.content[theirs] for name, theirs in kept.items() if theirs in fields.content}
        return SAE.from_tensors(
            label=str(path / ATOMS_FILE),
            architecture="itda",
            hook=self.hook(path, hints, stated),
            W_dec=atoms,
            b_dec=torch.zeros(d),
            gate={"b_enc": torch.zeros(n)},
            k=k,
            metadata=metadata,
        )


def _tensor(path: Path) -> Tensor:
    """The one tensor that a file holds."""
    content = load_pickled(path)
    if not isinstance(content, Tensor) or content.layout is not torch.strided or content.is_quantized:
        raise SAEFormatError(f"{path}: holds {type(content).__name__}; expected one plain tensor")
    return content.detach()
