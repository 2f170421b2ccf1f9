"""The bank's rows as the kernel reads them, and the dictionaries that they come from."""

from __future__ import annotations

from array import array
from collections import defaultdict
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
import torch

import sae_weights
from editserver.engine.config import EngineConfig
from editserver.engine.kernel_cpu import INPUT_NORMS
from editserver.engine.kernel_rows import gather_rows
from interventions.oracle import mean_pre_activation
from interventions.program import parse_feature_key, parse_mean_key
from sae_weights.feature_rows import StoredFeatures

FULL_ENCODE_BLOCK = 16
"""Rows of every dense product of the full-encode path."""


class Dictionaries:
    """The server's SAEs by content digest, opened read-only by every process that needs them."""

    def __init__(self, config: EngineConfig) -> None:
        self._saes: dict[str, sae_weights.SAE] = {}
        self._full: set[str] = set()
        self._means: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        self._stored: dict[str, StoredFeatures] = {}
        for source in config.saes:
            sae = source.open()
            self._saes[sae.digest] = sae
            if source.id in config.full_encode:
                self._full.add(sae.digest)

    @property
    def digests(self) -> list[str]:
        """Digests of all dictionaries, sorted."""
        return sorted(self._saes)

    @property
    def whole(self) -> list[str]:
        """Digests of those that the full-encode path may keep in memory, sorted."""
        return sorted(self._full)

    def __getitem__(self, digest: str) -> sae_weights.SAE:
        try:
            return self._saes[digest]
        except KeyError:
            raise KeyError(f"no SAE with digest {digest[:12]}… on this worker") from None

    def stored(self, digest: str) -> StoredFeatures | None:
        """All features of the SAE where they lie, or None: :meth:`sae_weights.SAE.stored`."""
        found = self._stored.get(digest)
        if found is None and (found := self[digest].stored()) is not None:
            self._stored[digest] = found
        return found

    def full_encode(self, digest: str, h: torch.Tensor) -> torch.Tensor:
        """All activations ``[n, n_features]`` (fp32) of the SAE for ``h [n, d]``; refuses SAEs it is not enabled for.

        Always in products of ``FULL_ENCODE_BLOCK`` rows, the last one filled up with zeros: a BLAS may add in another
        order for another number of rows, and then a chunked prefill would not see the bits that a whole one sees.
        """
        sae = self._whole(digest)
        n = len(h)
        padded = torch.nn.functional.pad(h, (0, 0, 0, -n % FULL_ENCODE_BLOCK))
        return torch.cat([sae.encode(block) for block in padded.split(FULL_ENCODE_BLOCK)])[:n]

    def delta(self, digest: str, h: torch.Tensor, z: torch.Tensor, edited: torch.Tensor) -> torch.Tensor:
        """decode(edited) − decode(z), in the space of ``h [n, d]``: fp32 ``[n, d]`` of activations ``[n, n_features]``.

        One token at a time: non-additive decoders have products of few columns, for which a BLAS adds in another order
        depending on where a row stands in a block. Refused like :meth:`full_encode`.
        """
        sae = self._whole(digest)
        rows = zip(h.split(1), z.split(1), edited.split(1), strict=True)
        return torch.cat([sae.delta(*(part.clone() for part in row)) for row in rows])

    def _whole(self, digest: str) -> sae_weights.SAE:
        if digest not in self._full:
            raise ValueError(f"the full-encode path is off for the SAE {digest[:12]}…")
        return self[digest]

    def mean(self, digest: str) -> tuple[torch.Tensor, torch.Tensor]:
        """``(row [d], bias [])`` of the SAE's mean pre-activation; reads the whole encoder once."""
        if digest not in self._means:
            self._means[digest] = mean_pre_activation(self[digest])
        return self._means[digest]

    def input_norm(self, digest: str) -> int:
        """How the SAE normalises its input, as the kernel's code."""
        return INPUT_NORMS[self[digest].input_norm]


class RowBank:
    """Read row, write row and gate of every slot, fp32, at fixed addresses: ``[rows, d]``, ``[rows, d]``, ``[rows, 4]``."""

    def __init__(self, rows: int, d_model: int, dictionaries: Dictionaries) -> None:
        self.read = torch.from_numpy(np.zeros((rows, d_model), np.float32))
        self.write = torch.from_numpy(np.zeros((rows, d_model), np.float32))
        self.gate = torch.zeros(rows, 4)
        self._arrays = self.read.numpy(), self.write.numpy(), self.gate.numpy()
        self._bits = self._arrays[0].view(np.uint32), self._arrays[1].view(np.uint32)
        self._content: list[str | None] = [None] * rows
        self._dictionaries = dictionaries

    @property
    def n_bytes(self) -> int:
        """Memory of the bank."""
        return sum(t.numel() * t.element_size() for t in (self.read, self.write, self.gate))

    def upload(self, keys: Sequence[str], slots: Sequence[int], vectors: Mapping[str, bytes]) -> int:
        """Make ``slots[i]`` hold the row ``keys[i]``; rows that are already there stay. Returns how many were written."""
        content, (read, write, gate) = self._content, self._arrays
        missing: list[tuple[str, int]] = []
        features: dict[str, list[int]] = defaultdict(list)
        for key, slot in zip(keys, slots, strict=True):
            if content[slot] == key:
                continue
            missing.append((key, slot))
            content[slot] = None  # nobody's until all is written: a row may turn out to be unreadable
            if key.startswith("f:"):
                digest, index = parse_feature_key(key)
                features[digest] += index, slot
            elif key in vectors:
                values = np.frombuffer(vectors[key], np.float32)
                if len(values) != read.shape[1]:
                    raise ValueError(f"row {key[:14]}… has {len(values)} values, expected {read.shape[1]}")
                read[slot] = write[slot] = values
                gate[slot] = 0.0
            else:
                mean, bias = self._dictionaries.mean(parse_mean_key(key))
                read[slot], write[slot] = mean.numpy(), 0.0
                gate[slot] = float(bias), 0.0, 0.0, 0.0
        for digest, pairs in features.items():
            self._take(digest, np.asarray(array("q", pairs)).reshape(-1, 2))
        for key, slot in missing:
            content[slot] = key
        return len(missing)

    def _take(self, digest: str, pairs: npt.NDArray[np.int64]) -> None:
        """Copy features of one SAE; ``pairs`` are their indices and slots."""
        stored = self._dictionaries.stored(digest)
        if stored is not None:
            stored.unchanged()
            if gather_rows(pairs, stored.encoder, stored.decoder, stored.gate, *self._bits, self._arrays[2]):
                return
        # Rows that have to be folded; or that cannot be used, and rows() says why.
        (read, write, gate), slots = self._arrays, pairs[:, 1]
        found = self._dictionaries[digest].rows(pairs[:, 0].tolist())
        read[slots], write[slots] = found.encoder.numpy(), found.decoder.numpy()
        gates = found.gate_bias, found.threshold, found.mag_scale, found.mag_bias
        gate[slots] = torch.stack(gates, dim=1).numpy()
