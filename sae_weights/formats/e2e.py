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
from .layout import Matrix, TensorRows
from .pickled import PickledFile
from .tensors import shown
from .yaml_config import read_yaml_object

CONFIG_FILE = "final_config.yaml"
_ENCODER = "encoder.0.weight"


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
            return any(name.endswith(_ENCODER) for name in PickledFile(path).shapes)
        except (SAEFormatError, OSError):
            return False

    def open(self, path: Path, hints: Hints) -> SAE:
        weights = _last(path) if path.is_dir() else path
        if weights is None:
            raise SAEFormatError(f"{path}: no .pt file; expected samples_N.pt beside {CONFIG_FILE}")
        config = weights.parent / CONFIG_FILE
        content = read_yaml_object(config) if config.is_file() else {}
        whole = PickledFile(weights)
        position = _position(whole, hints)
        file = PickledFile(weights, prefix=f"{position}.") if position else whole
        model = content.get("tlens_model_name")
        return SAE(
            architecture="e2e",
            hook=self.hook(weights, hints, position.replace("-", ".") or None),
            source=TensorRows(
                file,
                encoder=Matrix(_ENCODER),
                decoder=Matrix("decoder.weight", transposed=True),
                b_dec="decoder.bias",
                gate={"b_enc": "encoder.0.bias"},
                what="e2e_sae's layout",
            ),
            folding=Folding(input_scale=hints.norm_scaling_factor or 1.0, unit_decoder=True),
            metadata={"model_name": model} if isinstance(model, str) else {},
        )


def _position(file: PickledFile, hints: Hints) -> str:
    """The name in front of the chosen SAE's tensors; "" for a file that holds one SAE alone."""
    positions = [n.removesuffix(_ENCODER).removesuffix(".") for n in sorted(file.shapes) if n.endswith(_ENCODER)]
    if not positions:
        raise SAEFormatError(f"{file.path}: no tensor '…{_ENCODER}'; it holds {shown(file.shapes)}")
    if len(positions) == 1:
        return positions[0]
    wanted = parse_hook_name(hints.hook) if hints.hook else None
    chosen = [name for name in positions if parse_hook_name(name.replace("-", ".")) == wanted]
    if wanted is None or len(chosen) != 1:
        hooks = [name.replace("-", ".") for name in positions]
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
