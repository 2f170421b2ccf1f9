"""What editing keeps in memory, by name, as it is known before any of it is there."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from editserver.engine.config import EngineConfig
from sae_weights.sae import SAE

if TYPE_CHECKING:
    from editserver.engine.abilities import Abilities
    from editserver.engine.triton.step import DeviceStep

FLOAT, WORD = 4, 8
"""Bytes of a float32, and of a 64-bit word of bits."""

WORD_BITS = 64

STREAMS_OF_A_STEP = 4
"""Copies of the residual stream in float32 that a layer holds at once where the kernel cannot read the model's tensors itself,
or decoders are not additive."""

CHUNKS_OF_A_STEP = 3
"""Activations of one chunk that the full-encode path holds at once: blocks, all of them together, and an edited copy."""


@dataclass(frozen=True)
class Footprint:
    """Bytes by name of the buffer, in one worker.

    Attributes:
        reserved: allocated when the model is loaded.
        on_demand: allocated when first needed, or for the time of a step; about so much.
        kept: per token of the KV cache and along with it, at most.
        on_device: whether the reserved and the kept buffers lie on an accelerator, where profiling sees the former.
    """

    reserved: Mapping[str, int]
    on_demand: Mapping[str, int]
    kept: Mapping[str, int]
    on_device: bool = False

    @property
    def fixed_bytes(self) -> int:
        """All but what grows with the KV cache."""
        return sum(self.reserved.values()) + sum(self.on_demand.values())

    @property
    def kept_per_token(self) -> int:
        """Bytes per token of the KV cache."""
        return sum(self.kept.values())


@dataclass(frozen=True)
class Budget:
    """How a budget for the KV cache is divided: ``n_blocks`` blocks, and what is kept along with them.

    Attributes:
        kv_bytes, kept_bytes: of all blocks.
        share: of the kept bytes in both, 0 to 1.
    """

    n_blocks: int
    kv_bytes: int
    kept_bytes: int

    @classmethod
    def of(cls, available: int, kv_block_bytes: int, block_tokens: int, kept_per_token: int) -> Budget:
        """The most blocks of ``block_tokens`` tokens that fit into ``available`` bytes with what is kept of their tokens."""
        kept = block_tokens * kept_per_token
        n_blocks = max(0, available) // (kv_block_bytes + kept)
        return cls(n_blocks, n_blocks * kv_block_bytes, n_blocks * kept)

    @property
    def share(self) -> float:
        """See the class."""
        whole = self.kv_bytes + self.kept_bytes
        return self.kept_bytes / whole if whole else 0.0


def kept_per_token(config: EngineConfig) -> dict[str, int]:
    """Bytes per token of the KV cache: hits of sequence gates, and propositions of rules, as bits at every armed layer."""
    layers = len(config.armed)
    words = -(-config.propositions // WORD_BITS)
    return {"hits of gates": WORD * layers, "propositions of rules": WORD * words * layers}


def on_cpu(config: EngineConfig, d_model: int, max_tokens: int, whole: Iterable[SAE] = ()) -> Footprint:
    """Of the CPU engine; ``max_tokens`` per step, ``whole``: the dictionaries of the full-encode path."""
    from editserver.engine.full_encode import CHUNK_ELEMENTS

    stream = FLOAT * max_tokens * d_model
    sizes = [sae.whole_bytes for sae in whole]
    on_demand = {
        "a step's work": STREAMS_OF_A_STEP * stream + (CHUNKS_OF_A_STEP * FLOAT * CHUNK_ELEMENTS if sizes else 0)
    }
    if sizes:
        on_demand["whole dictionaries"] = sum(sizes)
    reserved = {
        "row bank": FLOAT * config.bank_rows * (2 * d_model + 4),
        "plan of a step": max_tokens * (8 + 8 + 4 + WORD),
        "stream of a step": stream + 2 * FLOAT * d_model,
        "gates of a step": max_tokens * (WORD + 1),
        "records of a step": len(config.armed) * max_tokens * (WORD + FLOAT + 1),
    }
    return Footprint(reserved, on_demand, kept_per_token(config))


def on_device(config: EngineConfig, d_model: int, abilities: Abilities, drafts: int = 0) -> Footprint:
    """Of the device engine with these abilities, none of whose buffers is made; whole dictionaries are read for it."""
    import torch

    from editserver.engine.rows import Dictionaries
    from editserver.engine.triton.encode import DeviceEncode
    from editserver.engine.triton.step import DeviceStep

    nowhere, capacity, encode = torch.device("meta"), abilities.capacity, None
    if abilities.encode is not None:
        sizes = capacity.tokens, capacity.residents, d_model
        encode = DeviceEncode(abilities.encode, config, Dictionaries(config), *sizes, nowhere)
    step = DeviceStep(capacity, config.armed, d_model, nowhere, drafts=drafts, rules=abilities.rules, encode=encode)
    return of_device(config, step)


def of_device(config: EngineConfig, step: DeviceStep) -> Footprint:
    """Of the device engine, from its own buffers."""
    reserved = {"row bank": step.bank.n_bytes, "tables of programs": step.tables.n_bytes}
    if step.encode is not None:
        reserved["whole dictionaries"] = step.encode.n_bytes
    reserved["plan and records of a step"] = step.n_bytes - sum(reserved.values())
    return Footprint(reserved, {}, step.kept_per_token, on_device=True)
