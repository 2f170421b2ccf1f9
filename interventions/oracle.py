"""The meaning of a program, as plain tensor code: what every fast kernel is tested against.

Pure functions of fp32 tensors, one channel after the other, no batching tricks. :mod:`interventions.program` has the
definitions in words.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from interventions.maps import gates
from interventions.program import (
    TABLE_HEADER,
    Channel,
    Gate,
    GateKind,
    LayerProgram,
    Op,
    OpKind,
    ReadKind,
    UnitKind,
    parse_feature_key,
)
from interventions.rules.code import RuleProgram
from interventions.rules.machine import Bits, Floats, proposition_scores
from interventions.selectors import Selector
from sae_weights.input_norm import INPUT_NORMS, normalise
from sae_weights.sae import SAE

MEAN_CHUNK = 2048
"""Rows of an encoder that are held while their mean is taken."""


@dataclass(frozen=True)
class Row:
    """What a channel reads with and writes along.

    With x̃ the normalised input of the SAE and u = read · x̃, a latent's activation is
    ``f(u) = relu(mag_scale·u + mag_bias) · 1[u + gate_bias > threshold]`` (strict). The row of a vector has
    ``read = write`` and no gate.

    Attributes:
        read, write: fp32 ``[d]``.
        input_norm: how the SAE normalises its input per token; "none" for vectors.
    """

    read: Tensor
    write: Tensor
    gate_bias: float = 0.0
    threshold: float = 0.0
    mag_scale: float = 1.0
    mag_bias: float = 0.0
    input_norm: str = "none"


@dataclass(frozen=True)
class LayerResult:
    """What the edits of one request do at one layer, for n tokens.

    Attributes:
        delta: fp32 ``[n, d]``, to be added to h; already scaled down where ``clamped``.
        fired: int64 ``[n]``, bit i = an op of intervention i changed the value x of a channel (x_i ≠ x_{i-1}) whose
            coefficient c·(x_n − a) is not zero in the end. Zero where the whole delta of the token is zero.
        dose: fp32 ``[n]``, ||delta|| / ||h|| of the delta that is applied; 0 where there is none.
        clamped: bool ``[n]``, where the delta was scaled down to ``max_dose``.
        over: bool ``[n]``, where a refusing program exceeds ``max_dose`` (the delta is left as it is).
    """

    delta: Tensor
    fired: Tensor
    dose: Tensor
    clamped: Tensor
    over: Tensor

    @property
    def written(self) -> Tensor:
        """bool ``[n]``: tokens with a non-zero delta. All others must keep h bit for bit."""
        return (self.delta != 0).any(dim=-1)

    def apply(self, h: Tensor) -> Tensor:
        """``dtype(fp32(h) + delta)`` for the written tokens of ``h [n, d]`` (the model's dtype), h for the others."""
        return torch.where(self.written[:, None], (h.float() + self.delta).to(h.dtype), h)


@dataclass(frozen=True)
class GateFacts:
    """What a gate did over a sequence.

    Attributes:
        open_from: first position at which it was open, None for never.
        statistic: the largest so far; 0 for triggers and rules.
    """

    open_from: int | None
    statistic: float


def listen(
    h: Tensor,
    layer: LayerProgram,
    row_of: Callable[[str], Row],
    members: Callable[[str], Tensor] | None,
    prompt_len: int,
    active: Bits | None = None,
) -> tuple[Tensor, tuple[GateFacts, ...]]:
    """Where the gates of a layer are open: bool ``[n_gates, n]`` for h ``[n, d]`` (a request's tokens from position 0 on).

    ``active [n, actions]`` says where the actions of the program's rules are; for gates that follow them.
    """
    opened = torch.zeros(len(layer.gates), len(h), dtype=torch.bool)
    facts = []
    for i, gate in enumerate(layer.gates):
        if gate.kind is GateKind.RULE:
            assert active is not None, "a gate that follows a rule needs to know where its action is active"
            opened[i] = torch.from_numpy(active[:, gate.action])
            facts.append(GateFacts(int(active[:, gate.action].argmax()) if opened[i].any() else None, 0.0))
            continue
        bits = hits(h.float(), gate, row_of, members).cpu().numpy()
        if gate.over_sequence:
            where, statistic, _ = gates.advance(gate.rule, gates.START, bits, prompt_len)
        else:
            where, statistic = bits, np.zeros(len(bits))
        opened[i] = torch.from_numpy(where)
        facts.append(GateFacts(int(where.argmax()) if where.any() else None, float(statistic.max(initial=0.0))))
    return opened.to(h.device), tuple(facts)


def hits(h: Tensor, gate: Gate, row_of: Callable[[str], Row], members: Callable[[str], Tensor] | None) -> Tensor:
    """bool ``[n]``: tokens of h ``[n, d]`` (fp32) where any of the gate's evidence is active."""
    found = torch.zeros(len(h), dtype=torch.bool, device=h.device)
    for key in gate.evidence:
        found |= _latent(h, gate.read, key, row_of(key), members)[0] != 0
    return found


def proposition_activations(
    h: Tensor,
    layer: int,
    rules: RuleProgram,
    row_of: Callable[[str], Row],
    members: Callable[[str], Tensor] | None,
) -> list[Floats]:
    """What the propositions of a layer look at: for each the activations ``[n, features]`` on the pre-edit h ``[n, d]``."""
    found = []
    for proposition in rules.propositions:
        if proposition.layer == layer:
            read = ReadKind.MEMBER if proposition.whole else ReadKind.LATENT
            columns = [_latent(h.float(), read, key, row_of(key), members)[0] for key in proposition.features]
            found.append(torch.stack(columns, dim=1).cpu().numpy())
    return found


def score_rules(
    h: Tensor,
    layer: int,
    rules: RuleProgram,
    row_of: Callable[[str], Row],
    members: Callable[[str], Tensor] | None = None,
) -> Floats:
    """Scores of a layer's propositions on the pre-edit h ``[n, d]``: float32 ``[n, propositions]``, NaN for other layers'."""
    if not any(one.layer == layer for one in rules.propositions):
        return np.full((len(h), len(rules.propositions)), np.nan, np.float32)
    return proposition_scores(rules, layer, proposition_activations(h, layer, rules, row_of, members))


def edit_layer(
    h: Tensor,
    layer: LayerProgram,
    selected: Tensor,
    row_of: Callable[[str], Row],
    members: Callable[[str], Tensor] | None = None,
    max_dose: float = math.inf,
    refuse: bool = False,
    effect: Callable[[str, Tensor, Tensor], Tensor] | None = None,
    opened: Tensor | None = None,
) -> LayerResult:
    """The delta of one request's program at one layer.

    Args:
        h: pre-edit residual stream after the layer, fp32 ``[n, d]``.
        layer: its channels.
        selected: bool ``[n_selectors, n]``, which tokens each of the program's selectors selects.
        row_of: row key → rows.
        members: SAE digest → activations of all its latents on h, ``[n, n_features]``; for MEMBER and JOINT channels.
        max_dose, refuse: the program's dose policy.
        effect: SAE digest, all activations z ``[n, n_features]``, edited z' → what the change does to h, ``[n, d]``;
            for JOINT channels.
        opened: bool ``[n_gates, n]``, where the layer's gates are open (:func:`listen`); None where it has none.
    """
    h = h.float()
    opened = torch.zeros(0, len(h), dtype=torch.bool, device=h.device) if opened is None else opened
    delta = torch.zeros_like(h)
    fired = torch.zeros(len(h), dtype=torch.int64, device=h.device)
    joint: dict[str, list[tuple[int, Channel]]] = {}
    for channel in layer.channels:
        if channel.read is ReadKind.JOINT:
            digest, index = parse_feature_key(channel.row)
            joint.setdefault(digest, []).append((index, channel))
            continue
        row = row_of(channel.row)
        a, scale = _read(h, channel, row, members)
        terms = remap_terms(h, channel, row_of, members)
        x, changed = compose(a, channel, selected, row_of, opened, terms)
        coefficient = scale * (x - a)
        # Where it is zero nothing is added: an infinite row entry or scale must not turn "no change" into NaN.
        delta += torch.where((coefficient != 0)[:, None], coefficient[:, None] * row.write, 0.0)
        fired |= torch.where(coefficient != 0, changed, 0)
    for digest, channels in joint.items():
        if members is None or effect is None:
            raise ValueError(f"the SAE {digest[:12]}… needs all its activations and its decoder")
        z = members(digest).float()
        edited = z.clone()
        for index, channel in channels:
            terms = remap_terms(h, channel, row_of, members)
            edited[:, index], changed = compose(z[:, index], channel, selected, row_of, opened, terms)
            fired |= torch.where(edited[:, index] != z[:, index], changed, 0)
        delta += effect(digest, z, edited)
    norm, size = h.norm(dim=-1), delta.norm(dim=-1)
    dose = torch.where(size > 0, size / norm, 0.0)
    excess = dose > max_dose
    if not refuse and math.isfinite(max_dose):
        delta = torch.where(excess[:, None], delta * (max_dose * norm / size)[:, None], delta)
        dose = dose.clamp(max=max_dose)
    none = torch.zeros_like(excess)
    fired = torch.where(size > 0, fired, 0)
    return LayerResult(delta, fired, dose, none if refuse else excess, excess if refuse else none)


def _read(h: Tensor, channel: Channel, row: Row, members: Callable[[str], Tensor] | None) -> tuple[Tensor, Tensor]:
    """The scalar a ``[n]`` of the channel, and the factor c ``[n]`` of its result."""
    zero, one = h.new_zeros(len(h)), h.new_ones(len(h))
    if channel.read is ReadKind.NONE:
        return zero, one
    if channel.read is ReadKind.NORM:
        return zero, h.norm(dim=-1)
    if channel.read is ReadKind.DOT:
        return h @ row.read, one
    return _latent(h, channel.read, channel.row, row, members)


def _latent(
    h: Tensor, read: ReadKind, key: str, row: Row, members: Callable[[str], Tensor] | None
) -> tuple[Tensor, Tensor]:
    """The latent's activation ``[n]``, and the SAE's per-token scale of what it writes."""
    assert row.input_norm in INPUT_NORMS
    view = normalise(h, row.input_norm)
    scale = view.scale.squeeze(-1)
    if read is ReadKind.LATENT:
        u = view.x @ row.read
        return torch.relu(row.mag_scale * u + row.mag_bias) * (u + row.gate_bias > row.threshold), scale
    digest, index = parse_feature_key(key)
    if members is None:
        raise ValueError(f"{key} needs the activations of its whole dictionary")
    return members(digest)[:, index].float(), scale


def remap_terms(
    h: Tensor, channel: Channel, row_of: Callable[[str], Row], members: Callable[[str], Tensor] | None
) -> list[Tensor]:
    """Per op of the channel, what a remap adds to alpha·x: beta·s + gamma·b ``[n]``; zeros for other ops."""
    found = []
    for op in channel.ops:
        term = h.new_zeros(len(h))
        if op.kind is OpKind.REMAP and op.beta != 0.0:
            term = term + op.beta * _unit(h, op, row_of(channel.row), row_of)
        if op.kind is OpKind.REMAP and op.source:
            term = term + op.gamma * _latent(h, channel.read, op.source, row_of(op.source), members)[0]
        found.append(term)
    return found


def _unit(h: Tensor, op: Op, row: Row, row_of: Callable[[str], Row]) -> Tensor:
    """s ``[n]`` of the op, on a latent with these rows."""
    if op.unit is UnitKind.ABSOLUTE:
        return h.new_ones(len(h))
    assert row.input_norm in INPUT_NORMS
    view = normalise(h, row.input_norm)
    if op.unit is UnitKind.RESIDUAL_NORM:
        scale = view.scale.squeeze(-1).expand(len(h))
        return torch.where(scale != 0, h.norm(dim=-1) / scale, 0.0)
    mean = row_of(op.mean)
    return (view.x @ mean.read + mean.gate_bias).abs()


def compose(
    a: Tensor,
    channel: Channel,
    selected: Tensor,
    row_of: Callable[[str], Row],
    opened: Tensor | None = None,
    terms: Sequence[Tensor] = (),
) -> tuple[Tensor, Tensor]:
    """The channel's ops on ``a [n]``, in order: final x ``[n]`` and the int64 bits ``[n]`` of who changed it.

    ``opened`` says where the layer's gates are open, ``terms`` are those of :func:`remap_terms`.
    """
    x = a
    changed = torch.zeros(len(a), dtype=torch.int64, device=a.device)
    for i, op in enumerate(channel.ops):
        acts = selected[op.selector]
        if op.scope >= 0:
            acts = acts & selected[op.scope]
        for gate in op.gates:
            assert opened is not None, "an op behind a gate needs to know where that is open"
            acts = acts & opened[gate]
        if op.only_if_active:
            acts = acts & (a != 0)
        mapped = torch.where(acts, _map(x, op, row_of, terms[i] if terms else None), x)
        changed |= torch.where(mapped != x, 1 << op.intervention, 0)
        x = mapped
    return x, changed


def _map(x: Tensor, op: Op, row_of: Callable[[str], Row], term: Tensor | None) -> Tensor:
    """What the op makes of the values ``x [n]``."""
    if op.kind is OpKind.RANGE:
        return torch.where((x > 0) & (op.lo <= x) & (x <= op.hi), 0.0, x)
    if op.kind is OpKind.GAIN:
        row = row_of(op.table).read
        low, inverse_width, n_bins = row[0], row[1], int(row[2])
        place = ((x - low) * inverse_width).floor().clamp(0, n_bins - 1).long()
        return x * (1.0 - op.strength * row[TABLE_HEADER + place])
    if op.kind is OpKind.REMAP:
        assert term is not None, "a remap needs its unit and its source"
        return (op.alpha * x + term).clamp(op.lo, op.hi)
    return (op.alpha * x + op.beta).clamp(op.lo, op.hi)


def select(selectors: Sequence[Selector], positions: Tensor, token_ids: Tensor, prompt_len: int) -> Tensor:
    """bool ``[n_selectors, n]``: :meth:`Selector.mask` of each selector for the tokens at ``positions [n]``."""
    masks = [selector.mask(positions, token_ids, prompt_len) for selector in selectors]
    return torch.stack(masks) if masks else torch.zeros(0, len(positions), dtype=torch.bool)


def row_source(vectors: Mapping[str, bytes], saes: Mapping[str, SAE]) -> Callable[[str], Row]:
    """Row key → :class:`Row`, from a program's own vectors and the SAEs by digest.

    Raises:
        KeyError: for a vector or an SAE that is not there.
    """

    def row_of(key: str) -> Row:
        if key.startswith("v:"):
            values = torch.frombuffer(bytearray(vectors[key]), dtype=torch.float32)
            return Row(values, values)
        if key.startswith("m:"):
            sae = saes[key.removeprefix("m:")]
            mean, bias = mean_pre_activation(sae)
            return Row(mean, torch.zeros_like(mean), float(bias), input_norm=sae.input_norm)
        digest, index = parse_feature_key(key)
        sae = saes[digest]
        rows = sae.rows([index])
        return Row(
            rows.encoder[0],
            rows.decoder[0],
            float(rows.gate_bias[0]),
            float(rows.threshold[0]),
            float(rows.mag_scale[0]),
            float(rows.mag_bias[0]),
            sae.input_norm,
        )

    return row_of


def mean_pre_activation(sae: SAE) -> tuple[Tensor, Tensor]:
    """``(row [d], bias [])``, fp32: row · x̃ + bias is the mean over all latents of the SAE's pre-activations."""
    total, bias = torch.zeros(sae.d_model, dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    for start in range(0, sae.n_features, MEAN_CHUNK):
        rows = sae.rows(range(start, min(start + MEAN_CHUNK, sae.n_features)))
        total += rows.encoder.double().sum(dim=0)
        bias += rows.gate_bias.double().sum()
    return (total / sae.n_features).float(), (bias / sae.n_features).float()


@dataclass(frozen=True)
class Latents:
    """Activations of one SAE: ``listed [n, m]`` of the features asked for, and the k largest by |activation|.

    ``top_index [n, k]`` (int64) and ``top_value [n, k]``; equal magnitudes are ordered by index.
    """

    listed: Tensor
    top_index: Tensor
    top_value: Tensor


def read_latents(h: Tensor, sae: SAE, features: Sequence[int], top_k: int) -> Latents:
    """What an inspection reports for ``h [n, d]``: only the listed rows are computed unless all latents are needed."""
    h = h.float()
    if sae.row_separable and not top_k:
        rows = sae.rows(features)
        listed = rows.activations(sae.token_scale(h)[0])
        return Latents(listed, torch.zeros(len(h), 0, dtype=torch.int64), h.new_zeros(len(h), 0))
    f = sae.encode(h)
    index = f.abs().argsort(dim=-1, descending=True, stable=True)[:, :top_k]
    return Latents(f[:, list(features)], index, f.gather(1, index))
