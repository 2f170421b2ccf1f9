"""What the self-test's programs are about: made-up dictionaries and vectors, and the server's own that are encoded as wholes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from editserver.engine.kernel_cpu import INPUT_NORMS
from editserver.engine.triton import codes
from editserver.engine.triton.encode import Weights
from interventions.oracle import Row
from interventions.program import (
    TABLE_HEADER,
    Channel,
    Gate,
    LayerProgram,
    Op,
    Payload,
    Program,
    Read,
    feature_key,
    mean_key,
    vector_key,
)
from interventions.selectors import ALL, Selector
from sae_weights.architectures.base import RowForm
from sae_weights.architectures.topk import topk_members
from sae_weights.input_norm import INPUT_NORMS as NORMS
from sae_weights.input_norm import InputNorm, normalise

LATENTS = 6
"""Of a made-up dictionary."""

ROWS_AT_ONCE = 1024
"""Of an encoder, in float64."""

Halves = tuple[torch.Tensor, torch.Tensor]
"""The residual stream as a model may hand it over: two tensors ``[n, d]`` in its dtype, of which it is the sum."""


def stream_of(halves: Sequence[torch.Tensor]) -> torch.Tensor:
    """``[n, d]``, as the kernels take it from the two."""
    return (halves[0].float() + halves[1].float()).to(halves[0].dtype)


@dataclass(frozen=True)
class Request:
    """One made-up request.

    Attributes:
        stage: what it is there to prove, for messages.
        payload: its program is at one layer.
        ids: int64 ``[n]``, its tokens.
        halves: the stream at them.
        start: position of the first one; 0 where anything looks back.
    """

    stage: str
    payload: Payload
    prompt_len: int
    ids: torch.Tensor
    halves: Halves
    start: int = 0

    @property
    def n(self) -> int:
        """Its tokens."""
        return len(self.ids)

    @property
    def positions(self) -> torch.Tensor:
        """int64 ``[n]``."""
        return torch.arange(self.start, self.start + self.n)


@dataclass(frozen=True)
class Facts:
    """What the resident tables ask of an SAE."""

    input_norm: InputNorm
    row_separable: bool = True
    n_features: int = LATENTS


@dataclass
class Made:
    """Rows by key, and what is known of their dictionaries by digest: ``weights`` for those that are encoded as wholes."""

    d: int
    dtype: torch.dtype
    random: np.random.Generator
    facts: dict[str, Facts] = field(default_factory=dict)
    rows: dict[str, Row] = field(default_factory=dict)
    vectors: dict[str, bytes] = field(default_factory=dict)
    weights: dict[str, Weights] = field(default_factory=dict)

    def __getitem__(self, digest: str) -> Facts:
        return self.facts[digest]

    def input_norm(self, digest: str) -> int:
        """As :meth:`~editserver.engine.rows.Dictionaries.input_norm`."""
        return INPUT_NORMS[self.facts[digest].input_norm]

    def _normal(self, scale: float) -> torch.Tensor:
        return torch.from_numpy((self.random.normal(size=self.d) * scale / math.sqrt(self.d)).astype(np.float32))

    def tokens(self, n: int) -> torch.Tensor:
        """int64 ``[n]``, of few kinds."""
        return torch.from_numpy(self.random.integers(0, 4, n))

    def halves(self, n: int) -> Halves:
        """A stream at ``n`` tokens."""
        drawn = torch.from_numpy(self.random.normal(size=(2, n, self.d)).astype(np.float32)).to(self.dtype)
        return drawn[0], drawn[1]

    def evident(self, keys: Sequence[str], rows: Sequence[str], n: int) -> Halves:
        """A stream at ``n`` tokens where the latents ``keys`` of a dictionary without a norm are clearly on or off: as ``rows``
        say, one string of 0 and 1 for each latent, over and over."""
        first, second = (half.float() for half in self.halves(n))
        wanted = torch.tensor([[4.0 * int(row[t % len(row)]) - 2.0 for row in rows] for t in range(n)])
        read = torch.stack([self.rows[key].read for key in keys])
        missing = wanted - (first + second) @ read.T
        second = second + torch.linalg.lstsq(read, missing.T).solution.T
        return first.to(self.dtype), second.to(self.dtype)

    def dictionary(self, norm: InputNorm = "none") -> list[str]:
        """Keys of a new one's latents: plain, thresholded and gated ones in turn; reads are of the order of 1."""
        digest = f"{len(self.facts):064x}"
        self.facts[digest] = Facts(norm)
        size = math.sqrt(self.d) if norm == "unit_norm" else 1.0
        for i in range(LATENTS):
            bias, scale = float(np.float32(0.3 * self.random.normal())), 1.0
            threshold = (0.0, 0.5, 0.0)[i % 3]
            own = bias
            if i % 3 == 2:
                scale, own = 1.5, bias + 0.25
            read, write = self._normal(size), self._normal(3.0)
            self.rows[feature_key(digest, i)] = Row(read, write, bias, threshold, scale, own, norm)
        self.rows[mean_key(digest)] = Row(self._normal(size), torch.zeros(self.d), 0.25, input_norm=norm)
        return [feature_key(digest, i) for i in range(LATENTS)]

    def whole(self, digest: str, weights: Weights) -> None:
        """One of the server's own dictionaries."""
        norm = next(name for name in NORMS if INPUT_NORMS[name] == weights.norm)
        self.facts[digest] = Facts(norm, weights.form == int(codes.SINGLE_ROWS), len(weights.gate))
        self.weights[digest] = weights

    def awake(self, digest: str, n: int) -> Halves:
        """A stream at ``n`` tokens that lies along the encoder's row of some latent of a dictionary, another one at each, and so
        far out that this one is active."""
        own = self.weights[digest]
        first, second = (half.float() for half in self.halves(n))
        chosen = torch.from_numpy(self.random.integers(0, len(own.gate), n))
        rows, gate = (part[chosen.to(part.device)].cpu() for part in (own.encoder, own.gate))
        gate_bias, threshold, mag_scale, mag_bias = gate.unbind(dim=1)
        due = torch.maximum(threshold - gate_bias, -mag_bias / mag_scale).clamp(min=0.0)
        size = rows.norm(dim=1).clamp(min=1e-6)
        reach = 2 * due / size + 4 * math.sqrt(2 * self.d)  # beside the noise, which is of the norm √2d
        second = second + (reach / size)[:, None] * rows
        return first.to(self.dtype), second.to(self.dtype)

    def marginal(self, digest: str, h: torch.Tensor, latents: int) -> list[str]:
        """Keys of so many latents of a dictionary whose members are few: at the first token of ``h [n, d]`` the weakest member and
        the strongest that is none, then those that are active most often. What they write is made up."""
        own, active = self.weights[digest], self.activations(digest, h)
        more = Made(self.d, self.dtype, self.random, self.facts, weights={digest: replace(own, k=own.k + 1)})
        outside = (more.activations(digest, h[:1])[0] != 0) & (active[0] == 0)
        weakest = torch.where(active[0] != 0, active[0].abs(), math.inf).argmin()
        often = (active != 0).sum(dim=0).argsort(descending=True, stable=True)
        chosen = dict.fromkeys([*outside.nonzero()[:1, 0].tolist(), int(weakest), *often[: latents + 2].tolist()])
        keys = [feature_key(digest, i) for i in sorted([*chosen][:latents])]
        norm = self.facts[digest].input_norm
        self.rows |= {key: Row(torch.zeros(self.d), self._normal(3.0), input_norm=norm) for key in keys}
        return keys

    def activations(self, digest: str, h: torch.Tensor) -> torch.Tensor:
        """All activations ``[n, n_features]`` of a whole dictionary on ``h [n, d]``, fp32: the definition, on the device where
        the weights lie and with its products in float64."""
        own = self.weights[digest]
        x = normalise(h.to(own.encoder.device, torch.float64), self.facts[digest].input_norm).x
        u = torch.cat([x @ rows.double().T for rows in own.encoder.split(ROWS_AT_ONCE)], dim=1)
        form = RowForm(*own.gate.double().unbind(dim=1))
        if own.form == int(codes.SINGLE_ROWS):
            return form.transfer(u).float().cpu()
        pre = u + form.gate_bias
        ranked = pre.abs() if own.magnitudes else pre
        ranked = ranked if own.scale is None else ranked * own.scale.double()
        magnitude = pre if own.form == int(codes.SIGNED_MEMBERS) else torch.relu(pre)
        return (magnitude * topk_members(ranked, own.k)).float().cpu()

    def latents(self, digest: str, features: Sequence[int], h: torch.Tensor) -> torch.Tensor:
        """Activations ``[n, features]`` of some latents on ``h [n, d]``, fp32."""
        if digest in self.weights:
            return self.activations(digest, h)[:, list(features)]
        rows = [self.rows[feature_key(digest, feature)] for feature in features]
        x = normalise(h, self.facts[digest].input_norm).x
        gates = torch.tensor([(r.gate_bias, r.threshold, r.mag_scale, r.mag_bias) for r in rows])
        return RowForm(*gates.unbind(dim=1)).transfer(x @ torch.stack([row.read for row in rows]).T)

    def vector(self, values: torch.Tensor) -> str:
        """Key of a vector."""
        data = values.numpy().astype("<f4").tobytes()
        self.rows[vector_key(data)] = Row(values, values)
        self.vectors[vector_key(data)] = data
        return vector_key(data)

    def unit(self) -> str:
        """Key of a random direction."""
        return self.vector(torch.nn.functional.normalize(self._normal(1.0), dim=0))

    def table(self) -> str:
        """Key of a gain table."""
        row = torch.zeros(self.d)
        bins = min(8, self.d - TABLE_HEADER)
        row[:TABLE_HEADER] = torch.tensor([0.1, 2.0, float(bins)])
        row[TABLE_HEADER : TABLE_HEADER + bins] = torch.from_numpy(self.random.random(bins).astype(np.float32))
        return self.vector(row)


EVERYWHERE = Selector(ALL.ranges, (), True)


def op(alpha: float, beta: float, lo: float = -math.inf, hi: float = math.inf, **more: Any) -> Op:
    """An op; by default at the tokens of the first selector, for the first intervention."""
    return Op(alpha, beta, lo, hi, **({"only_if_active": False, "selector": 0, "intervention": 0} | more))


def payload(
    made: Made,
    layer: int,
    channels: Sequence[Channel],
    selectors: tuple[Selector, ...] = (EVERYWHERE,),
    reads: tuple[Read, ...] = (),
    gates: tuple[Gate, ...] = (),
    **more: Any,
) -> Payload:
    """``more``: dose policy and rules of the program."""
    ordered = tuple(sorted(channels, key=lambda c: (c.read, c.row)))
    keys = {c.row for c in ordered} | {one.table for c in ordered for one in c.ops}
    vectors = {key: made.vectors[key] for key in keys & made.vectors.keys()}
    return Payload(Program((LayerProgram(layer, ordered, gates),), selectors, vectors, **more), reads, None)
