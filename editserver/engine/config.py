"""What every process of one server must agree on: carried by vLLM's ``additional_config`` (which also salts the compile cache)."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from editserver import __version__
from editserver.engine.wire import KEY
from interventions.limits import Limits
from sae_weights.formats import Origin
from sae_weights.sae import SAE
from sae_weights.sidecar import read_sidecar

ENGINE_ABI = 1
"""Raise it when the traced graph changes, so that no compiled artefact of an older build is reused."""


ENGINE_VARIABLE = "EDITSERVER_ENGINE"
"""Environment variable with the default of :attr:`EngineConfig.engine`, for tests."""
ENGINES = ("auto", "device")


def _engine(name: object) -> str:
    if name not in ENGINES:
        raise ValueError(f"engine is {name!r}, expected one of {ENGINES}")
    return str(name)


@dataclass(frozen=True)
class SAESource:
    """One dictionary as every process opens it, read-only.

    Attributes:
        id: the name that requests use.
        origin: what opens it (``sae_weights`` ``Origin.as_dict()``): path, format, and what the caller had to say.
        digest: of the content that must then be there.
        layer: the decoder layer whose residual stream it reads.
    """

    id: str
    origin: Mapping[str, Any]
    digest: str
    layer: int

    @property
    def path(self) -> str:
        """The file or folder."""
        return str(self.origin["path"])

    def open(self) -> SAE:
        """The dictionary; reads headers and vectors, no matrix (nor for the digest, where the file carries it).

        Raises:
            SAEFormatError: it cannot be opened.
            ValueError: it has another content than the server was started with.
        """
        sae = Origin.from_dict(self.origin).open()
        sae.metadata = {**sae.metadata, **read_sidecar(Path(self.path))}
        if sae.digest != self.digest:
            raise ValueError(
                f"SAE {self.id} at {self.path} has digest {sae.digest[:12]}…, but the server was started with "
                f"{self.digest[:12]}…; the files differ between processes, or changed since the start"
            )
        return sae


@dataclass(frozen=True)
class EngineConfig:
    """Configuration of the engine plugin.

    Attributes:
        armed: decoder layers (0-based) with an edit op in their graph.
        saes: the dictionaries that programs may refer to (by digest).
        full_encode: ids of the SAEs whose every pre-activation may be computed (top-k, TopK membership).
        bank_rows: capacity of the row bank, shared by all running requests.
        propositions: most of one request's rules; along with the KV cache there is room for so many bits.
        engine: "auto" edits with kernels where the model lies on a GPU and on the host elsewhere; "device" with kernels
            everywhere (on a CPU under Triton's interpreter, for tests).
    """

    armed: tuple[int, ...]
    saes: tuple[SAESource, ...] = ()
    full_encode: tuple[str, ...] = ()
    bank_rows: int = 8192
    propositions: int = Limits.propositions
    engine: str = field(default_factory=lambda: os.environ.get(ENGINE_VARIABLE, "auto"))
    version: str = __version__
    abi: int = field(default=ENGINE_ABI)

    def on_device(self, device_type: str) -> bool:
        """Whether an engine of kernels edits where the model lies on devices of this type."""
        return device_type == "cuda" or self.engine == "device"

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready form for ``additional_config["editserver"]``."""
        return asdict(self) | {"armed": list(self.armed), "saes": [asdict(s) for s in self.saes]}

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> EngineConfig:
        """Inverse of :meth:`as_dict`; raises ``ValueError`` naming what does not fit."""
        try:
            config = cls(
                armed=tuple(sorted({int(layer) for layer in raw["armed"]})),
                saes=tuple(SAESource(**s) for s in raw.get("saes", ())),
                full_encode=tuple(raw.get("full_encode", ())),
                bank_rows=int(raw.get("bank_rows", 8192)),
                propositions=int(raw.get("propositions", Limits.propositions)),
                engine=_engine(raw.get("engine", "auto")),
                version=str(raw.get("version", __version__)),
                abi=int(raw.get("abi", ENGINE_ABI)),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"additional_config[{KEY!r}] is not an editserver configuration: {error!r}") from error
        if (config.version, config.abi) != (__version__, ENGINE_ABI):
            raise ValueError(
                f"this process runs editserver {__version__} (engine ABI {ENGINE_ABI}), but the server was configured by "
                f"{config.version} (ABI {config.abi}); install the same version everywhere"
            )
        return config

    @classmethod
    def of(cls, vllm_config: Any) -> EngineConfig | None:
        """The configuration inside a ``VllmConfig``, or None when the server was not started for editing."""
        additional = getattr(vllm_config, "additional_config", None)
        if not isinstance(additional, Mapping) or KEY not in additional:
            return None
        return cls.from_dict(additional[KEY])
