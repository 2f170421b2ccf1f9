"""What a checkpoint format is: something that recognises its files and opens them as the canonical SAE."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from sae_weights.errors import SAEFormatError
from sae_weights.hook import Hook, parse_hook_name

from .fields import shown

if TYPE_CHECKING:
    from sae_weights.sae import SAE


@dataclass(frozen=True)
class Hints:
    """What the caller knows and a checkpoint may not say; what it does say must agree.

    Attributes:
        hook, hook_out: hook names, ``blocks.12.hook_resid_post`` or ``model.layers.12``.
        k: latents per token.
        norm_scaling_factor: the constant that scaled the inputs in training.
        groups: how many groups of a Matryoshka dictionary to take.
        threshold: read a TopK-like dictionary as a JumpReLU with this threshold (an approximation).
        model_name: the model that it belongs to; joins the metadata.
        overrides: fields of its config that are missing or wrong, by what SAELens' registry knows (SAELens only).
    """

    hook: str | None = None
    hook_out: str | None = None
    k: int | None = None
    norm_scaling_factor: float | None = None
    groups: int | None = None
    threshold: float | None = None
    model_name: str | None = None
    overrides: Mapping[str, Any] | None = None

    def as_dict(self) -> dict[str, Any]:
        """The ones that are given."""
        return {name: value for name, value in asdict(self).items() if value is not None}


@dataclass(frozen=True)
class Origin:
    """How to open a dictionary again, in another process."""

    path: str
    format: str
    hints: Hints

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {"path": self.path, "format": self.format, "hints": self.hints.as_dict()}

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> Origin:
        """Inverse of :meth:`as_dict`; raises ValueError for anything else."""
        known = {field.name for field in fields(Hints)}
        hints = dict(raw.get("hints") or {})
        if unknown := hints.keys() - known:
            raise ValueError(f"hints: {sorted(unknown)}; expected some of {sorted(known)}")
        return cls(str(raw["path"]), str(raw["format"]), Hints(**hints))

    def open(self) -> SAE:
        """The dictionary; raises SAEFormatError."""
        from sae_weights.formats import load_sae

        return load_sae(self.path, format=self.format, hints=self.hints)


# What a layer is called in a path: layer_12, layers.12, layer12, l19, L15R, blocks.3.
_LAYER_IN_PATH = re.compile(
    r"(?:^|[^A-Za-z0-9])(?:(?:layers?|blocks|resid_post_layer|resid_post)[._-]?|l|h\.)(\d{1,3})(?:r|m|a|tc)?(?![0-9A-Za-z])",
    re.IGNORECASE,
)


class Format(ABC):
    """One published layout. One file each, registered in ``sae_weights/formats/__init__.py``.

    Attributes:
        name: how commands name it. title: who writes it. files: what it looks like on disk. reference: where it is defined.
        architectures: names of the architectures that can come out.
        edited: whether a server can edit through any of its dictionaries; False where all of them read one place and write
            another (transcoders), read several (crosscoders), or sit on a hook that is not served (hook_z).
    """

    name: ClassVar[str]
    title: ClassVar[str]
    files: ClassVar[str]
    reference: ClassVar[str]
    architectures: ClassVar[tuple[str, ...]]
    edited: ClassVar[bool] = True

    @abstractmethod
    def recognises(self, path: Path) -> bool:
        """Whether this folder or file looks like one, by names and config keys; cheap, never raises."""

    @abstractmethod
    def open(self, path: Path, hints: Hints) -> SAE:
        """The canonical SAE; raises SAEFormatError naming file and key."""

    def hook(self, path: Path, hints: Hints, stated: str | None = None, *, point: str = "resid_post") -> Hook:
        """Where the dictionary reads: as hinted, else as its config states, else ``point`` of the layer that the path names.

        Raises SAEFormatError where the hint is no hook, where hint and config are different places of the residual
        stream, or where nobody says.
        """
        given = {"the given hook": hints.hook, "its config": stated}
        found = {who: parse_hook_name(name) for who, name in given.items() if name}
        for who, hook in found.items():
            if hook is None and who == "the given hook":
                raise SAEFormatError(f"hook: {shown(hints.hook)}; expected one like 'blocks.15.hook_resid_post'")
        known = [hook for hook in found.values() if hook is not None]
        if len({hook.edit_layer for hook in known}) > 1:
            told = " and ".join(f"{who} {given[who]!r}" for who in found)
            raise SAEFormatError(f"{path}: {told} are different places; expected the same one")
        if known:
            return known[0]
        # The last folder that names a layer wins: …/resid_post/layer_20/width_16k/average_l0_71/params.npz
        for part in reversed(path.parts[-6:]):
            if match := _LAYER_IN_PATH.search(part):
                return Hook(point, int(match[1]))
        raise SAEFormatError(
            f"{path}: neither the files nor their path say which layer this dictionary belongs to; "
            "name its hook, e.g. --hook blocks.15.hook_resid_post"
        )
