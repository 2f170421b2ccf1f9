"""From what a request says to the canonical :class:`~interventions.program.Program` that the engine executes.

Names are resolved to content, everything is checked against the server (layers, dimensions, indices, limits), no-ops
are dropped, and equal meanings get equal programs: order, labels and names leave no trace in the digest.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from interventions.catalogue import Catalogue, CatalogueSAE
from interventions.compiled import Compiled, Entry, can_select_prompt, check_selectable
from interventions.concepts.gain import TAU
from interventions.errors import Code, InterventionError
from interventions.instruction import Draft, Instruction, latent_instruction, norm, rounded
from interventions.limits import Limits
from interventions.program import Gate, Program, Read, ReadKind, feature_key, vector_key
from interventions.remapping import remapped
from interventions.resolve import Resolver, check_limit, placed
from interventions.rule_compile import RuleCompiler, RuleParts
from interventions.rule_sources import read_sources
from interventions.rules.ruleset import Action
from interventions.selectors import Selector, union
from interventions.spec import EditFeatures, Inspect, Intervention, Remap, Rules, Steer, Suppress
from interventions.suppression import suppress_fitted, suppress_inline

__all__ = ["Catalogue", "CatalogueSAE", "Compiled", "Entry", "check_selectable", "compile_request"]

Array = npt.NDArray[np.float32]


def compile_request(
    interventions: Sequence[Intervention], inspect: Sequence[Inspect], catalogue: Catalogue
) -> Compiled:
    """Resolve, check and canonicalise.

    Raises:
        InterventionError: with the codes of the HTTP contract and ``param`` naming the field.
    """
    limits = catalogue.limits
    check_limit("interventions", len(interventions), limits.interventions, "interventions")
    resolver = Resolver(catalogue)
    compiler = _Compiler(resolver, RuleCompiler(read_sources(interventions, resolver), resolver))
    entries = [compiler.entry(i, spec) for i, spec in enumerate(interventions)]
    reads = [compiler.read(spec) for spec in inspect]
    listed = sum(len(read.features) for read in reads)
    check_limit("inspected_features", listed, limits.inspected_features, "inspect")
    rules = compiler.rules.assembled()
    program = _program(compiler.draft, rules, catalogue)
    _check_bits(program, len(reads), limits)
    gated = {} if rules.names is None else {one.intervention: one for one in rules.names.actions if one.kind == "when"}
    return Compiled(
        program=program,
        entries=tuple(replace(one, when=gated[i].number) if i in gated else one for i, one in enumerate(entries)),
        reads=tuple(reads),
        inspect_ids=tuple(spec.sae for spec in inspect),
        needs_full=frozenset(resolver.needs_full),
        inspects_prompt=any(can_select_prompt(read.selector) for read in reads),
        inspect_params=tuple(spec.param for spec in inspect),
        inspect_approximate=tuple(catalogue.sae(spec.sae).sae.approximates is not None for spec in inspect),
        rules=rules.names,
    )


def _program(draft: Draft, rules: RuleParts, catalogue: Catalogue) -> Program | None:
    if rules.program is not None:
        draft.named.update(rules.program.row_keys)
        check_limit("rows", len(draft.named), catalogue.limits.rows, "interventions")
    return draft.program(catalogue.max_dose, catalogue.refuse_over_dose, rules.program, rules.numbers)


def _check_bits(program: Program | None, n_reads: int, limits: Limits) -> None:
    selectors, gates = 0, 0
    if program is not None:
        selectors, gates = len(program.selectors), max((len(layer.gates) for layer in program.layers), default=0)
    check_limit("selectors", selectors + n_reads, limits.selectors, "inspect" if program is None else "interventions")
    check_limit("gates", gates, limits.gates, "interventions")


@dataclass(frozen=True)
class _Made:
    """What became of one intervention: ``noop`` where none of its instructions is left."""

    layers: tuple[int, ...]
    selector: Selector
    noop: bool
    approximate: bool
    scope: Selector | None = None
    gate: Gate | None = None


@dataclass
class _Compiler:
    resolver: Resolver
    rules: RuleCompiler
    draft: Draft = field(default_factory=Draft)

    # one intervention ------------------------------------------------------------------------------------------------

    def entry(self, i: int, spec: Intervention) -> Entry:
        """Add one intervention's instructions and say what it became."""
        if isinstance(spec, Rules):
            made = self.ruled(i)
        else:
            use = self.rules.when(i)
            with self.draft.behind(() if use is None else (use.gate,)):
                made = self.made(i, spec)
            if use is not None:
                use.noop, use.action = made.noop, replace(use.action, layers=made.layers)
        approximate = made.approximate or self.rules.approximate(i)
        return Entry(
            spec.id, spec.type, made.layers, made.selector, made.noop, spec.param, approximate, made.scope, made.gate
        )

    def ruled(self, i: int) -> _Made:
        """The actions of a rule set, each behind its gate."""
        ruleset = self.rules.sources.sets[i].ruleset
        done = [made for made in (self.act(i, action) for action in ruleset.actions) if made is not None]
        return _Made(
            layers=tuple(sorted({layer for made in done for layer in made.layers})),
            selector=union([made.selector for made in done], any(made.selector.include_bos for made in done)),
            noop=not ruleset.rules,
            approximate=any(made.approximate for made in done),
        )

    def act(self, i: int, action: Action) -> _Made | None:
        """One action of the rule set of intervention ``i``; what became of the intervention that it does, if it does one."""
        use = self.rules.action(i, action)
        if action.kind != "do":
            return None
        spec = self.rules.intervention(action)
        try:
            with self.draft.behind((use.gate,)):
                made = self.made(i, spec)
        except InterventionError as error:
            raise self.rules.inside(i, action, error) from None
        use.noop = made.noop
        use.action = replace(use.action, type=spec.type, layers=made.layers, selector=made.selector)
        return made

    def made(self, i: int, spec: Intervention) -> _Made:
        """Add the instructions of an intervention that is no rule set."""
        selector = self.resolver.selector(spec.tokens, spec.include_bos, f"{spec.param}.tokens", "invalid_intervention")
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
                assert isinstance(spec, Remap)
                offered, kept, scope, gate = self.remap(i, spec, selector)
            layers = (offered.layer,)
        limits = self.resolver.catalogue.limits
        check_limit("instructions", self.draft.n_instructions, limits.instructions, spec.param)
        check_limit("rows", len(self.draft.named), limits.rows, spec.param)
        approximate = offered is not None and offered.sae.approximates is not None
        return _Made(layers, selector, not kept, approximate, scope, gate)

    def steer(self, i: int, spec: Steer, selector: Selector) -> tuple[tuple[int, ...], bool]:
        source, by_layer = self.directions(spec)
        kept = False
        for layer in sorted(by_layer):
            row = by_layer[layer]
            sign = _sign(row)
            kind, alpha, beta, lo, hi = ReadKind.NONE, 1.0, sign * spec.strength, -math.inf, math.inf
            if spec.mode == "add":
                row = row * np.float32(sign)
            else:
                row = _unit(row, f"{spec.param}.{source}", spec.mode) * np.float32(sign)
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
        param = spec.param
        offered = self.resolver.sae(spec.sae, f"{param}.sae")
        kind = self.resolver.latents(offered, f"{param}.sae")
        digest, kept = offered.sae.digest, False
        for j, edit in enumerate(spec.features):
            self.resolver.check_index(offered, edit.index, f"{param}.features[{j}].index")
            instruction = latent_instruction(edit, selector, i)
            kept |= self.draft.add(offered.layer, kind, feature_key(digest, edit.index), instruction)
        return offered, kept

    def suppress(self, i: int, spec: Suppress, selector: Selector) -> tuple[CatalogueSAE, bool]:
        param, base = f"{spec.param}.concept", Instruction(selector, i)
        tau = TAU if spec.tau is None else spec.tau
        if isinstance(spec.concept, str):
            try:
                offered, concept = self.resolver.catalogue.concept(spec.concept)
                parts = suppress_fitted(concept, spec.chosen, spec.strength, tau, self.resolver.catalogue.d_model, base)
            except InterventionError as error:
                raise placed(error, param) from None
        else:
            given, param = spec.concept, f"{param}.sae"
            offered = self.resolver.sae(given.sae, param)
            for j, index in enumerate(given.features):
                self.resolver.check_index(offered, index, f"{spec.param}.concept.features[{j}]")
            statistics = given.statistic("mu"), given.statistic("sigma")
            parts = suppress_inline(given.features, *statistics, spec.chosen, spec.strength, tau, base)
        kind = self.resolver.latents(offered, param)
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
            offered, fitted = self.resolver.catalogue.map(spec.map)
        except InterventionError as error:
            raise placed(error, param) from None
        kind = self.resolver.latents(offered, param)
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

    # names to content ------------------------------------------------------------------------------------------------

    def directions(self, spec: Steer) -> tuple[str, dict[int, Array]]:
        """The field that named the direction, and float32 ``[d_model]`` per layer."""
        if spec.vector is not None:
            param = f"{spec.param}.vector"
            try:
                found = self.resolver.catalogue.vector(spec.vector)
            except InterventionError as error:
                raise placed(error, param) from None
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
                self.resolver.check_layer(layer, f"{spec.param}.layers[{j}]" if spec.layers else f"{spec.param}.layer")
            source = "values"
        else:
            assert spec.sae is not None
            assert spec.feature is not None
            param = f"{spec.param}.feature"
            offered = self.resolver.sae(spec.sae, f"{spec.param}.sae")
            self.resolver.check_index(offered, spec.feature, param)
            self.resolver.check_layer(offered.layer, f"{spec.param}.sae")
            by_layer = {offered.layer: _array(offered.sae.rows([spec.feature]).decoder[0])}
            source = "feature"
        for layer, row in by_layer.items():
            self.resolver.check_layer(layer, param)
            if row.shape != (self.resolver.catalogue.d_model,):
                have = "×".join(str(extent) for extent in row.shape)
                message = f"has {have} numbers at layer {layer}; d_model is {self.resolver.catalogue.d_model}"
                raise InterventionError("wrong_dimension", f"{param}: {message}", param)
            if not np.isfinite(row).all():
                message = f"is not finite at layer {layer}"
                raise InterventionError("invalid_intervention", f"{param}: {message}", param)
        return source, by_layer

    # inspections -----------------------------------------------------------------------------------------------------

    def read(self, spec: Inspect) -> Read:
        code: Code = "invalid_inspection"
        offered = self.resolver.sae(spec.sae, f"{spec.param}.sae")
        self.resolver.check_layer(offered.layer, f"{spec.param}.sae")
        check_limit("top_k", spec.top_k, self.resolver.catalogue.limits.top_k, f"{spec.param}.top_k")
        features = tuple(spec.features or ())
        for j, index in enumerate(features):
            self.resolver.check_index(offered, index, f"{spec.param}.features[{j}]")
        if spec.top_k:
            self.resolver.full(offered, f"{spec.param}.top_k", code, "to report the largest activations")
        elif not offered.sae.row_separable:
            self.resolver.full(offered, f"{spec.param}.sae", code, "to read its latents")
        selector = self.resolver.selector(spec.tokens, spec.include_bos, f"{spec.param}.tokens", code)
        top_k = min(spec.top_k, offered.sae.n_features)
        return Read(offered.sae.digest, offered.layer, features, top_k, selector, spec.after)


def _array(row: Any) -> Array:
    """float32 numpy view or copy of a numpy or torch vector."""
    if isinstance(row, torch.Tensor):
        return row.detach().to(torch.float32).cpu().numpy()
    return np.asarray(row, dtype=np.float32)


def _sign(row: Array) -> float:
    """Of its first non-zero component: v and −v thereby share one row, and what is done along them composes exactly."""
    places = np.flatnonzero(row)
    return float(np.sign(row[places[0]])) if len(places) else 1.0


def _unit(row: Array, param: str, mode: str) -> Array:
    """v̂ of v."""
    length = norm(row)
    if length == 0.0:
        message = f"mode {mode} needs a direction; this vector is zero"
        raise InterventionError("invalid_intervention", f"{param}: {message}", param)
    return (row.astype(np.float64) / length).astype(np.float32)
