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
from interventions.concepts.gain import TAU
from interventions.errors import Code, InterventionError
from interventions.fields import Part
from interventions.instruction import Draft, Instruction, latent_instruction, norm, rounded
from interventions.limits import Limits
from interventions.program import Gate, Program, Read, ReadKind, feature_key, vector_key
from interventions.remapping import remapped
from interventions.selectors import (
    ALL,
    GENERATED,
    LAST_PROMPT_TOKEN,
    PROMPT,
    Selector,
    slice_selector,
    union,
)
from interventions.spec import EditFeatures, Inspect, Intervention, Remap, Steer, Suppress, join
from interventions.suppression import suppress_fitted, suppress_inline
from interventions.wording import choices, printable, show

__all__ = ["Catalogue", "CatalogueSAE", "Compiled", "Entry", "check_selectable", "compile_request"]

Array = npt.NDArray[np.float32]

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
    program = compiler.draft.program(catalogue.max_dose, catalogue.refuse_over_dose)
    _check_bits(program, len(reads), limits)
    return Compiled(
        program=program,
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


def _check_bits(program: Program | None, n_reads: int, limits: Limits) -> None:
    selectors, gates = (
        (0, 0) if program is None else (len(program.selectors), max(len(x.gates) for x in program.layers))
    )
    _limit("selectors", selectors + n_reads, limits.selectors, "inspect" if program is None else "interventions")
    _limit("gates", gates, limits.gates, "interventions")


@dataclass
class _Compiler:
    catalogue: Catalogue
    draft: Draft = field(default_factory=Draft)
    needs_full: set[str] = field(default_factory=set)

    # one intervention ------------------------------------------------------------------------------------------------

    def entry(self, i: int, spec: Intervention) -> Entry:
        """Add one intervention's instructions and say what it became."""
        selector = self.selector(spec.tokens, spec.include_bos, f"{spec.param}.tokens", "invalid_intervention")
        offered: CatalogueSAE | None = None
        scope: Selector | None = None
        gate: Gate | None = None
        if isinstance(spec, Steer):
            layers, kept = self.steer(i, spec, selector)
        else:
            if isinstance(spec, EditFeatures):
                offered, kept = self.edit_features(i, spec, selector)
            elif isinstance(spec, Suppress):
                offered, kept = self.suppress(i, spec, selector)
            else:
                offered, kept, scope, gate = self.remap(i, spec, selector)
            layers = (offered.layer,)
        limits = self.catalogue.limits
        _limit("instructions", self.draft.n_instructions, limits.instructions, spec.param)
        _limit("rows", len(self.draft.named), limits.rows, spec.param)
        approximate = offered is not None and offered.sae.approximates is not None
        return Entry(spec.id, spec.type, layers, selector, not kept, spec.param, approximate, scope, gate)

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
            instruction = Instruction(selector, i, rounded(alpha), rounded(beta), rounded(lo), rounded(hi))
            kept |= self.draft.add(layer, kind, key, instruction, not row.any(), {key: values})
        return tuple(sorted(by_layer)), kept

    def edit_features(self, i: int, spec: EditFeatures, selector: Selector) -> tuple[CatalogueSAE, bool]:
        offered = self.sae(spec.sae, f"{spec.param}.sae")
        kind = self.latents(offered, f"{spec.param}.sae")
        kept = False
        for j, edit in enumerate(spec.features):
            self.check_index(offered, edit.index, f"{spec.param}.features[{j}].index")
            instruction = latent_instruction(edit, selector, i)
            kept |= self.draft.add(offered.layer, kind, feature_key(offered.sae.digest, edit.index), instruction)
        return offered, kept

    def suppress(self, i: int, spec: Suppress, selector: Selector) -> tuple[CatalogueSAE, bool]:
        param, base = f"{spec.param}.concept", Instruction(selector, i)
        tau = TAU if spec.tau is None else spec.tau
        if isinstance(spec.concept, str):
            try:
                offered, concept = self.catalogue.concept(spec.concept)
                parts = suppress_fitted(concept, spec.chosen, spec.strength, tau, self.catalogue.d_model, base)
            except InterventionError as error:
                raise _placed(error, param) from None
        else:
            given, param = spec.concept, f"{param}.sae"
            offered = self.sae(given.sae, param)
            for j, index in enumerate(given.features):
                self.check_index(offered, index, f"{spec.param}.concept.features[{j}]")
            statistics = given.statistic("mu"), given.statistic("sigma")
            parts = suppress_inline(given.features, *statistics, spec.chosen, spec.strength, tau, base)
        kind = self.latents(offered, param)
        kept = False
        for part in parts:
            key, tables = feature_key(offered.sae.digest, part.latent), {}
            if part.table is not None:
                tables[part.instruction.table] = part.table
            kept |= self.draft.add(offered.layer, kind, key, part.instruction, vectors=tables)
        return offered, kept

    def remap(self, i: int, spec: Remap, selector: Selector) -> tuple[CatalogueSAE, bool, Selector | None, Gate | None]:
        param = f"{spec.param}.map"
        try:
            offered, fitted = self.catalogue.map(spec.map)
        except InterventionError as error:
            raise _placed(error, param) from None
        kind = self.latents(offered, param)
        try:
            found = remapped(fitted, spec.strength, kind, Instruction(selector, i))
        except InterventionError as error:
            param = f"{spec.param}.{error.param}"
            raise InterventionError("invalid_intervention", f"{param}: {error.message}", param) from None
        self.draft.named.update(found.rows)
        kept = False
        for latent, instruction in found.parts:
            key = feature_key(offered.sae.digest, latent)
            kept |= self.draft.add(offered.layer, kind, key, instruction)
        return offered, kept, found.scope, found.gate

    def latents(self, offered: CatalogueSAE, param: str) -> ReadKind:
        """How the latents of the SAE are read in order to be edited; refuses an SAE that cannot be edited here."""
        self.check_layer(offered.layer, param)
        if not needs_full_encode(offered.sae):
            return ReadKind.LATENT
        self.full(offered, param, "invalid_intervention", "to edit its latents")
        return ReadKind.MEMBER if offered.sae.additive else ReadKind.JOINT

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


def _placed(error: InterventionError, param: str) -> InterventionError:
    """The catalogue's error, with the field that named the missing thing."""
    if error.param is None:
        error.param = param
    return error


def _array(row: Any) -> Array:
    """float32 numpy view or copy of a numpy or torch vector."""
    if isinstance(row, torch.Tensor):
        return row.detach().to(torch.float32).cpu().numpy()
    return np.asarray(row, dtype=np.float32)


def _unit(row: Array, param: str, mode: str) -> tuple[Array, float]:
    """``(unit vector, sign)``: v̂ = sign · unit vector, whose first non-zero component is positive.

    v̂ and −v̂ thereby share one row, and the ops along them compose.
    """
    length = norm(row)
    if length == 0.0:
        message = f"mode {mode} needs a direction; this vector is zero"
        raise InterventionError("invalid_intervention", f"{param}: {message}", param)
    unit = (row.astype(np.float64) / length).astype(np.float32)
    sign = float(np.sign(unit[np.flatnonzero(unit)[0]]))
    return unit * np.float32(sign), sign
