"""From what a request says to the canonical :class:`~interventions.program.Program` that the engine executes.

Names are resolved to content, everything is checked against the server (layers, dimensions, indices, limits), no-ops
are dropped, and equal meanings get equal programs: order, labels and names leave no trace in the digest.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from interventions.catalogue import Catalogue, CatalogueSAE, how_to_edit, needs_full_encode
from interventions.compiled import Compiled, Entry, can_select_prompt, check_selectable
from interventions.errors import Code, InterventionError
from interventions.fields import Part
from interventions.program import (
    Channel,
    LayerProgram,
    Op,
    Program,
    Read,
    ReadKind,
    feature_key,
    vector_key,
)
from interventions.selectors import (
    ALL,
    GENERATED,
    LAST_PROMPT_TOKEN,
    PROMPT,
    Selector,
    slice_selector,
    union,
)
from interventions.spec import EditFeatures, FeatureEdit, Inspect, Intervention, Steer, join
from interventions.wording import choices, printable, show

__all__ = ["Catalogue", "CatalogueSAE", "Compiled", "Entry", "check_selectable", "compile_request"]

Array = npt.NDArray[np.float32]

_LARGEST_STATE = 1e6
"""Activations and norms of the residual stream stay below this (attention sinks reach some 10,000)."""
_LARGEST_DELTA = 1e18
"""Its square is still far inside float32."""
_LARGEST_LATENT, _LARGEST_EDITED_LATENT = 1e4, 1e6
"""The same for latents whose decoder multiplies up to three of them: activations, and what an edit may make of them."""

_KEYWORD = {"all": ALL, "prompt": PROMPT, "generated": GENERATED, "last_prompt_token": LAST_PROMPT_TOKEN}


def compile_request(
    interventions: Sequence[Intervention], inspect: Sequence[Inspect], catalogue: Catalogue
) -> Compiled:
    """Resolve, check and canonicalise.

    Raises:
        InterventionError: with the codes of the HTTP contract and ``param`` naming the field.
    """
    limits = catalogue.limits
    _limit("interventions", len(interventions), limits.interventions, "interventions")
    compiler = _Compiler(catalogue)
    entries = tuple(compiler.entry(i, spec) for i, spec in enumerate(interventions))
    reads = [compiler.read(spec) for spec in inspect]
    listed = sum(len(read.features) for read in reads)
    _limit("inspected_features", listed, limits.inspected_features, "inspect")
    return Compiled(
        program=compiler.program(),
        entries=entries,
        reads=tuple(reads),
        inspect_ids=tuple(spec.sae for spec in inspect),
        needs_full=frozenset(compiler.needs_full),
        inspects_prompt=any(can_select_prompt(read.selector) for read in reads),
        inspect_params=tuple(spec.param for spec in inspect),
        inspect_approximate=tuple(catalogue.sae(spec.sae).sae.approximates is not None for spec in inspect),
    )


def _limit(name: str, have: int, bound: int, param: str) -> None:
    if have > bound:
        shown = name.replace("_", " ")
        raise InterventionError("limit_exceeded", f"{param}: {have} {shown}; this server allows {bound}", param)


def _round(value: float) -> float:
    """To the nearest float32 (``inf`` beyond its range)."""
    with np.errstate(over="ignore"):
        return float(np.float32(value)) + 0.0


@dataclass(frozen=True)
class _Instruction:
    """One op, before selectors are numbered and equal rows meet in one channel."""

    alpha: float
    beta: float
    lo: float
    hi: float
    only_if_active: bool
    selector: Selector
    intervention: int

    @property
    def is_identity(self) -> bool:
        return (self.alpha, self.beta, self.lo, self.hi) == (1.0, 0.0, -math.inf, math.inf)


@dataclass
class _Compiler:
    catalogue: Catalogue
    channels: dict[tuple[int, ReadKind, str], list[_Instruction]] = field(default_factory=dict)
    vectors: dict[str, bytes] = field(default_factory=dict)
    needs_full: set[str] = field(default_factory=set)
    named: set[str] = field(default_factory=set)
    """Row keys of all instructions, no-ops included."""
    n_instructions: int = 0

    # one intervention ------------------------------------------------------------------------------------------------

    def entry(self, i: int, spec: Intervention) -> Entry:
        """Add one intervention's instructions and say what it became."""
        selector = self.selector(spec.tokens, spec.include_bos, f"{spec.param}.tokens", "invalid_intervention")
        approximate = False
        if isinstance(spec, Steer):
            layers, kept = self.steer(i, spec, selector)
        else:
            layers, kept = self.edit_features(i, spec, selector)
            approximate = self.sae(spec.sae, f"{spec.param}.sae").sae.approximates is not None
        limits = self.catalogue.limits
        _limit("instructions", self.n_instructions, limits.instructions, spec.param)
        _limit("rows", len(self.named), limits.rows, spec.param)
        return Entry(spec.id, spec.type, layers, selector, not kept, spec.param, approximate)

    def steer(self, i: int, spec: Steer, selector: Selector) -> tuple[tuple[int, ...], bool]:
        source, by_layer = self.directions(spec)
        kept = False
        for layer in sorted(by_layer):
            row = by_layer[layer]
            kind, alpha, beta, lo, hi = ReadKind.NONE, 1.0, spec.strength, -math.inf, math.inf
            if spec.mode != "add":
                row, sign = _unit(row, f"{spec.param}.{source}", spec.mode)
                if spec.mode == "normalized":
                    kind, beta = ReadKind.NORM, sign * spec.strength
                elif spec.mode == "project_out":
                    kind, alpha, beta = ReadKind.DOT, 1.0 - spec.strength, 0.0
                else:
                    low = -math.inf if spec.min is None else spec.min
                    high = math.inf if spec.max is None else spec.max
                    kind, beta, lo, hi = ReadKind.DOT, 0.0, *((low, high) if sign > 0 else (-high, -low))
            values = (row + np.float32(0.0)).astype("<f4").tobytes()
            key = vector_key(values)
            instruction = _Instruction(_round(alpha), _round(beta), _round(lo), _round(hi), False, selector, i)
            if self.add(layer, kind, key, instruction, silent=not row.any()):
                self.vectors[key] = values
                kept = True
        return tuple(sorted(by_layer)), kept

    def edit_features(self, i: int, spec: EditFeatures, selector: Selector) -> tuple[tuple[int, ...], bool]:
        offered = self.sae(spec.sae, f"{spec.param}.sae")
        self.check_layer(offered.layer, f"{spec.param}.sae")
        kind = ReadKind.LATENT
        if needs_full_encode(offered.sae):
            kind = ReadKind.MEMBER if offered.sae.additive else ReadKind.JOINT
            self.full(offered, f"{spec.param}.sae", "invalid_intervention", "to edit its latents")
        kept = False
        for j, edit in enumerate(spec.features):
            self.check_index(offered, edit.index, f"{spec.param}.features[{j}].index")
            instruction = _Instruction(*_latent_op(edit), edit.only_if_active, selector, i)
            kept |= self.add(offered.layer, kind, feature_key(offered.sae.digest, edit.index), instruction)
        return (offered.layer,), kept

    def add(self, layer: int, kind: ReadKind, key: str, instruction: _Instruction, silent: bool = False) -> bool:
        """Count the instruction; keep it unless it changes nothing."""
        self.n_instructions += 1
        self.named.add(key)
        selects = bool(instruction.selector.ranges or instruction.selector.token_ids)
        if silent or instruction.is_identity or not selects:
            return False
        self.channels.setdefault((layer, kind, key), []).append(instruction)
        return True

    # names to content ------------------------------------------------------------------------------------------------

    def directions(self, spec: Steer) -> tuple[str, dict[int, Array]]:
        """The field that named the direction, and float32 ``[d_model]`` per layer."""
        if spec.vector is not None:
            param = f"{spec.param}.vector"
            try:
                found = self.catalogue.vector(spec.vector)
            except InterventionError as error:
                raise _placed(error, param) from None
            by_layer = {int(layer): _array(row) for layer, row in found.items()}
            source = "vector"
        elif spec.values is not None:
            param = f"{spec.param}.values"
            layers = spec.layers if spec.layers is not None else [spec.layer if spec.layer is not None else 0]
            if spec.values.ndim == 2 and len(spec.values) != len(layers):
                message = f"has {len(spec.values)} vectors for {len(layers)} layers"
                raise InterventionError("wrong_dimension", f"{param}: {message}", param)
            rows = spec.values if spec.values.ndim == 2 else [spec.values] * len(layers)
            by_layer = dict(zip(layers, rows, strict=True))
            for j, layer in enumerate(layers):
                self.check_layer(layer, f"{spec.param}.layers[{j}]" if spec.layers else f"{spec.param}.layer")
            source = "values"
        else:
            assert spec.sae is not None
            assert spec.feature is not None
            param = f"{spec.param}.feature"
            offered = self.sae(spec.sae, f"{spec.param}.sae")
            self.check_index(offered, spec.feature, param)
            self.check_layer(offered.layer, f"{spec.param}.sae")
            by_layer = {offered.layer: _array(offered.sae.rows([spec.feature]).decoder[0])}
            source = "feature"
        for layer, row in by_layer.items():
            self.check_layer(layer, param)
            if row.shape != (self.catalogue.d_model,):
                have = "×".join(str(extent) for extent in row.shape)
                message = f"has {have} numbers at layer {layer}; d_model is {self.catalogue.d_model}"
                raise InterventionError("wrong_dimension", f"{param}: {message}", param)
            if not np.isfinite(row).all():
                message = f"is not finite at layer {layer}"
                raise InterventionError("invalid_intervention", f"{param}: {message}", param)
        return source, by_layer

    def sae(self, name: str, param: str) -> CatalogueSAE:
        try:
            return self.catalogue.sae(name)
        except InterventionError as error:
            raise _placed(error, param) from None

    def full(self, offered: CatalogueSAE, param: str, code: Code, why: str) -> None:
        """Note that all latents of the SAE are needed; refuse if the engine does not compute them."""
        sae = offered.sae
        if not offered.full_encode:
            how = how_to_edit(offered)
            if not needs_full_encode(sae):
                how = f"start the server with --full-encode {offered.id} ({sae.architecture} SAE)"
            raise InterventionError(code, f"{param}: {why}, {how}", param)
        self.needs_full.add(offered.id)

    def check_index(self, offered: CatalogueSAE, index: int, param: str) -> None:
        if not 0 <= index < offered.sae.n_features:
            message = f"index {show(index)}; {offered.id} has 0..{offered.sae.n_features - 1}"
            raise InterventionError("unknown_feature", f"{param}: {message}", param)

    def check_layer(self, layer: int, param: str) -> None:
        n_layers, armed = self.catalogue.n_layers, sorted(self.catalogue.armed_layers)
        if not 0 <= layer < n_layers:
            message = f"layer {show(layer)}; the model has 0..{n_layers - 1}"
            raise InterventionError("invalid_intervention", f"{param}: {message}", param)
        if layer not in armed:
            message = f"layer {layer} is not armed; armed are {choices(armed)}"
            hint = f"start the server with --arm-layers {layer} to edit it"
            raise InterventionError("layer_not_armed", f"{param}: {message} ({hint})", param)

    # selectors -------------------------------------------------------------------------------------------------------

    def selector(self, parts: Sequence[Part], include_bos: bool, param: str, code: Code) -> Selector:
        """The canonical selector of a ``tokens`` field."""
        limits = self.catalogue.limits
        _limit("selector_parts", len(parts), limits.selector_parts, param)
        _limit("selector_tokens", sum(len(part.tokens) for part in parts), limits.selector_tokens, param)
        found: list[Selector] = []
        for part in parts:
            if part.keyword is not None:
                found.append(_KEYWORD[part.keyword])
            elif part.slice is not None:
                found.append(slice_selector(*part.slice))
            else:
                path = (*part.path, "tokens")
                ids = [self.token_id(t, join(param, *path, i), code) for i, t in enumerate(part.tokens)]
                found.append(Selector((), tuple(ids)))
        return union(found, include_bos)

    def token_id(self, token: int | str, param: str, code: Code) -> int:
        if isinstance(token, int):
            if not 0 <= token < self.catalogue.vocab_size:
                message = f"token id {show(token)}; the model has 0..{self.catalogue.vocab_size - 1}"
                raise InterventionError(code, f"{param}: {message}", param)
            return token
        tried: list[str] = []
        for text in (token, f" {token}"):
            ids = self.catalogue.encode_text(text)
            if len(ids) == 1:
                return ids[0]
            pieces = choices(repr(printable(self.catalogue.decode_token(i))) for i in ids[:16])
            tried.append(f"{show(text)} is {len(ids)} tokens ({pieces}{', …' if len(ids) > 16 else ''})")
        raise InterventionError(code, f"{param}: a string must be exactly one token; {', '.join(tried)}", param)

    # inspections -----------------------------------------------------------------------------------------------------

    def read(self, spec: Inspect) -> Read:
        code: Code = "invalid_inspection"
        offered = self.sae(spec.sae, f"{spec.param}.sae")
        self.check_layer(offered.layer, f"{spec.param}.sae")
        _limit("top_k", spec.top_k, self.catalogue.limits.top_k, f"{spec.param}.top_k")
        features = tuple(spec.features or ())
        for j, index in enumerate(features):
            self.check_index(offered, index, f"{spec.param}.features[{j}]")
        if spec.top_k:
            self.full(offered, f"{spec.param}.top_k", code, "to report the largest activations")
        elif not offered.sae.row_separable:
            self.full(offered, f"{spec.param}.sae", code, "to read its latents")
        selector = self.selector(spec.tokens, spec.include_bos, f"{spec.param}.tokens", code)
        top_k = min(spec.top_k, offered.sae.n_features)
        return Read(offered.sae.digest, offered.layer, features, top_k, selector, spec.after)

    def check_reach(self, kind: ReadKind, row: str, instructions: Sequence[_Instruction]) -> None:
        """Refuse a channel whose delta could leave what float32 can square, so that no norm overflows to infinity."""
        factor, reach = 1.0, 0.0
        if kind is ReadKind.NONE:
            factor = _norm(np.frombuffer(self.vectors[row], "<f4"))
        elif kind is ReadKind.NORM:
            factor = _LARGEST_STATE
        elif kind is ReadKind.JOINT:
            reach = _LARGEST_LATENT
        else:
            reach = _LARGEST_STATE
        bound = _LARGEST_EDITED_LATENT if kind is ReadKind.JOINT else _LARGEST_DELTA
        for op in instructions:
            reach = abs(op.alpha) * reach + abs(op.beta)
            reach = max(abs(min(max(x, op.lo), op.hi)) for x in (-reach, reach))
            if reach * factor > bound:
                message = f"the edit could be of size {reach * factor:.3g}, beyond what float32 arithmetic can carry"
                param = f"interventions[{op.intervention}]"
                raise InterventionError("invalid_intervention", f"{param}: {message}", param)

    # canonical form --------------------------------------------------------------------------------------------------

    def program(self) -> Program | None:
        """Everything that was added, in canonical order; ``None`` if nothing was."""
        if not self.channels:
            return None
        selectors = tuple(sorted({op.selector for ops in self.channels.values() for op in ops}))
        number = {selector: i for i, selector in enumerate(selectors)}
        layers: dict[int, list[Channel]] = {}
        for (layer, kind, row), instructions in sorted(self.channels.items()):
            self.check_reach(kind, row, instructions)
            ops = [
                Op(o.alpha, o.beta, o.lo, o.hi, o.only_if_active, number[o.selector], o.intervention)
                for o in instructions
            ]
            if kind in (ReadKind.NONE, ReadKind.NORM):  # constants only add up: their order means nothing
                ops.sort(key=lambda op: (op.selector, op.beta, op.intervention))
            layers.setdefault(layer, []).append(Channel(kind, row, tuple(ops)))
        return Program(
            layers=tuple(LayerProgram(layer, tuple(channels)) for layer, channels in layers.items()),
            selectors=selectors,
            vectors=dict(sorted(self.vectors.items())),
            max_dose=_round(self.catalogue.max_dose),
            refuse_over_dose=bool(self.catalogue.refuse_over_dose) and math.isfinite(self.catalogue.max_dose),
        )


def _placed(error: InterventionError, param: str) -> InterventionError:
    """The catalogue's error, with the field that named the missing thing."""
    if error.param is None:
        error.param = param
    return error


def _latent_op(edit: FeatureEdit) -> tuple[float, float, float, float]:
    """(alpha, beta, lo, hi) of one op on a latent."""
    value = edit.value if edit.value is not None else 0.0
    if edit.op == "set":
        return 0.0, value + 0.0, -math.inf, math.inf
    if edit.op == "scale":
        return value + 0.0, 0.0, -math.inf, math.inf
    if edit.op == "add":
        return 1.0, value + 0.0, -math.inf, math.inf
    if edit.op == "clamp":
        low = -math.inf if edit.min is None else edit.min + 0.0
        high = math.inf if edit.max is None else edit.max + 0.0
        return 1.0, 0.0, low, high
    return 0.0, 0.0, -math.inf, math.inf


def _array(row: Any) -> Array:
    """float32 numpy view or copy of a numpy or torch vector."""
    if isinstance(row, torch.Tensor):
        return row.detach().to(torch.float32).cpu().numpy()
    return np.asarray(row, dtype=np.float32)


def _norm(row: Array) -> float:
    """Euclidean norm, correctly rounded, so that every machine derives the same unit vector."""
    return math.sqrt(math.fsum((row.astype(np.float64) ** 2).tolist()))


def _unit(row: Array, param: str, mode: str) -> tuple[Array, float]:
    """``(unit vector, sign)``: v̂ = sign · unit vector, whose first non-zero component is positive.

    v̂ and −v̂ thereby share one row, and the ops along them compose.
    """
    norm = _norm(row)
    if norm == 0.0:
        message = f"mode {mode} needs a direction; this vector is zero"
        raise InterventionError("invalid_intervention", f"{param}: {message}", param)
    unit = (row.astype(np.float64) / norm).astype(np.float32)
    sign = float(np.sign(unit[np.flatnonzero(unit)[0]]))
    return unit * np.float32(sign), sign
