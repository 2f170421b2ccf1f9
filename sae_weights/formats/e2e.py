"""Apollo Research's e2e_sae: one .pt file for the SAEs of several places, beside final_config.yaml.

Layout: ``samples_{n}.pt``, the state of an ``nn.ModuleDict`` by hook name with dashes for dots, fp32::

    blocks-6-hook_resid_pre.encoder.0.weight [n, d], ….encoder.0.bias [n], ….decoder.weight [d, n], ….decoder.bias [d]

final_config.yaml: ``{tlens_model_name, saes: {sae_positions, dict_size_to_input_ratio, …}, …}``. A state of one SAE without
the names in front is read too. Of several places the hook chooses one; of several files in a folder the last is read.

Folded, and why: the authors' forward pass divides each decoder column by its norm, whatever is stored; that is done once, at
load. No bias is subtracted from the input.

Source: e2e-sae 2.1.1, models/sparsifiers.py and models/transformers.py (MIT). Braun et al. 2024, arXiv:2405.12241.
"""

from __future__ import annotations

from pathlib import Path

from sae_weights.errors import SAEFormatError
from sae_weights.folding import Folding
from sae_weights.hook import parse_hook_name
from sae_weights.sae import SAE

from .base import Format, Hints
from .input_scale import constant_scale
from .layout import Matrix, TensorRows
from .pickled import PickledFile
from .tensors import shown
from .yaml_config import read_yaml_object

CONFIG_FILE = "final_config.yaml"
_TENSORS = ("encoder.0.weight", "encoder.0.bias", "decoder.weight", "decoder.bias")


class EndToEndSAE(Format):
    """See the module."""

    name = "e2e"
    title = "Apollo e2e_sae"
    files = f"{CONFIG_FILE} + samples_N.pt (encoder.0.weight by place)"
    reference = "e2e-sae 2.1.1, github.com/ApolloResearch/e2e_sae"
    architectures = ("e2e",)

    def recognises(self, path: Path) -> bool:
        if path.is_dir():
            return (path / CONFIG_FILE).is_file() and _last(path) is not None
        if path.suffix != ".pt" or not path.is_file():
            return False
        try:
            return any(name.endswith(_TENSORS[0]) for name in PickledFile(path).shapes)
        except (SAEFormatError, OSError):
            return False

    def open(self, path: Path, hints: Hints) -> SAE:
        weights = _last(path) if path.is_dir() else path
        if weights is None:
            raise SAEFormatError(f"{path}: no .pt file; expected samples_N.pt beside {CONFIG_FILE}")
        config = weights.parent / CONFIG_FILE
        content = read_yaml_object(config) if config.is_file() else {}
        file = PickledFile(weights)
        positions = _positions(file)
        position = _chosen(file, positions, hints)
        # Named by the whole name, so that errors are.
        of = {name: f"{position}.{name}" if position else name for name in _TENSORS}
        others = [f"{other}.{name}" for other in positions - {position} for name in _TENSORS]
        model = content.get("tlens_model_name")
        return SAE(
            architecture="e2e",
            hook=self.hook(weights, hints, position.replace("-", ".") or None),
            source=TensorRows(
                file,
                encoder=Matrix(of["encoder.0.weight"]),
                decoder=Matrix(of["decoder.weight"], transposed=True),
                b_dec=of["decoder.bias"],
                gate={"b_enc": of["encoder.0.bias"]},
                ignore=others,
                what="e2e_sae's layout",
            ),
            folding=Folding(input_scale=constant_scale(weights, hints), unit_decoder=True),
            metadata={"model_name": model} if isinstance(model, str) else {},
        )


def _positions(file: PickledFile) -> set[str]:
    """The names in front of the SAEs' tensors; "" for a file that holds one SAE alone."""
    names = [(name, inner) for name in file.shapes for inner in _TENSORS if name.endswith(inner)]
    positions = {name.removesuffix(inner).removesuffix(".") for name, inner in names}
    if not positions:
        raise SAEFormatError(f"{file.path}: no tensor '…{_TENSORS[0]}'; it holds {shown(file.shapes)}")
    return positions


def _chosen(file: PickledFile, positions: set[str], hints: Hints) -> str:
    """The one position, or the one that the hook names."""
    if len(positions) == 1:
        return next(iter(positions))
    wanted = parse_hook_name(hints.hook) if hints.hook else None
    chosen = [name for name in positions if parse_hook_name(name.replace("-", ".")) == wanted]
    if wanted is None or len(chosen) != 1:
        hooks = sorted(name.replace("-", ".") for name in positions)
        raise SAEFormatError(
            f"{file.path}: holds the SAEs of {', '.join(hooks)}; "
            + (f"{hints.hook!r} is none of them" if hints.hook else f"choose one, e.g. --hook {hooks[0]}")
        )
    return chosen[0]


def _last(folder: Path) -> Path | None:
    """The file of the most samples, as the authors' loader takes it."""
    numbered = {p: p.stem.rpartition("_")[2] for p in folder.glob("*.pt")}
    files = [p for p, number in numbered.items() if number.isdecimal() and len(number) < 20]
    return max(files, key=lambda p: int(numbered[p]), default=None)
