"""The tables of rules on the device, from those of the CPU's engine: one layer's columns for all resident requests."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

from editserver.engine.rule_table import RuleRun, RuleTable
from editserver.engine.triton import codes
from editserver.engine.triton.arena import Spec, at
from editserver.engine.triton.capacity import CapacityError, RuleCapacity
from editserver.engine.triton.tables import Columns, Listing
from interventions.rules.code import RuleProgram

if TYPE_CHECKING:
    from editserver.engine.resident import ResidentSet

Array = npt.NDArray[Any]
I32, I64, F32 = torch.int32, torch.int64, torch.float32

DEEPEST = 62
"""Values that wait at the same time in a body: two stacks of bits in 64-bit integers."""

Placed = Mapping[tuple[int, str, int], int]
"""(resident, SAE digest, latent) → column of the step's ``members``, at one layer."""


def specs_of(capacity: RuleCapacity, residents: int) -> dict[str, Spec]:
    """Of one layer."""
    n = capacity.rows
    return {
        "pointers": ((residents + 1, int(codes.POINTER_COLUMNS)), I32),
        "own": ((residents, sum(capacity.words)), I64),
        "feature_ptr": ((residents + 1,), I32),
        "feature_rows": ((n, int(codes.READ_COLUMNS)), I32),
        "feature_centred": ((residents,), I32),
        "propositions": ((n, int(codes.PROPOSITION_COLUMNS)), I32),
        "thresholds": ((n,), F32),
        "terms": ((n,), I32),
        "weights": ((n,), F32),
        "branches": ((n, int(codes.BRANCH_COLUMNS)), I32),
        "branch_values": ((n, 2), F32),
        "memories": ((n, int(codes.MEMORY_COLUMNS)), I32),
        "parts": ((2 * n,), I32),
        "codes": ((4 * n, 2), I32),
        "group_ptr": ((residents + 1,), I32),
        "groups": ((n, 3), I32),
        "rules": ((n, int(codes.RULE_COLUMNS)), I32),
        "conclusions": ((n, 2), I32),
        "actions": ((n, 4), I32),
        "gates": ((n, 2), I32),
    }


def columns_of(
    capacity: RuleCapacity, residents: ResidentSet, layers: Sequence[int], placed: Mapping[int, Placed]
) -> Columns:
    """Of all layers; arguments and errors as :meth:`~editserver.engine.triton.rules.DeviceRules.columns`'."""
    runs = [one.rules for one in residents.requests.values()]
    ruled = [run for run in runs if run is not None]
    if len(ruled) > capacity.requests:
        raise CapacityError("requests with rules", len(ruled), capacity.requests)
    for run in ruled:
        _fits(capacity, run.program, len(run.cells))
    bases = np.cumsum([0, *(len(run.cells) if run is not None else 0 for run in runs)])
    found: Columns = {}
    for layer in layers:
        table = residents.rules.tables.get(layer)
        columns = _idle(len(runs)) if table is None else _layer(capacity, table, bases, runs, placed.get(layer, {}))
        found |= at(layer, columns)
    return found


def _fits(capacity: RuleCapacity, program: RuleProgram, cells: int) -> None:
    for name in ("propositions", "conclusions", "actions", "memories"):
        if len(getattr(program, name)) > getattr(capacity, name):
            raise CapacityError(f"{name} of one request's rules", len(getattr(program, name)), getattr(capacity, name))
    if cells > capacity.cells:
        raise CapacityError("numbers that one request's rules keep", cells, capacity.cells)


def _layer(
    capacity: RuleCapacity, table: RuleTable, bases: Array, runs: Sequence[RuleRun | None], placed: Placed
) -> Columns:
    if table.depth > DEEPEST:
        raise CapacityError("values that wait in the body of a rule", table.depth, DEEPEST)
    if table.n_columns > capacity.features:
        raise CapacityError("latents that one request's rules look at at a layer", table.n_columns, capacity.features)
    propositions, thresholds, terms, weights, branches, values, memories, parts, steps, rules, heads, actions = (
        table.stage
    )
    pointers = table.pointers
    # Cells are counted from the request's own first one.
    memories, heads, actions = memories.copy(), heads.copy(), actions.copy()
    for rows, column, pointer in ((memories, 6, 1), (heads, 1, 3), (actions, 3, 4)):
        base = np.repeat(bases[:-1], np.diff(pointers[:, pointer]))
        rows[:, column] = np.where(rows[:, column] < 0, -1, rows[:, column] - base)
    group_ptr, groups = _groups(pointers[:, 2], rules, steps)
    return {
        "pointers": pointers[:, [0, 1, 3, 4, 5]].astype(np.int32),
        "own": _own(capacity, table, runs),
        **_features(table, placed),
        "propositions": propositions.astype(np.int32),
        "thresholds": thresholds,
        "terms": terms.astype(np.int32),
        "weights": weights,
        "branches": branches.astype(np.int32),
        "branch_values": values,
        "memories": memories.astype(np.int32),
        "parts": parts.astype(np.int32),
        "codes": steps.astype(np.int32),
        "group_ptr": group_ptr,
        "groups": groups,
        "rules": rules[:, 1:].astype(np.int32),
        "conclusions": heads.astype(np.int32),
        "actions": actions.astype(np.int32),
        "gates": table.gates.astype(np.int32),
    }


def _own(capacity: RuleCapacity, table: RuleTable, runs: Sequence[RuleRun | None]) -> Array:
    """The bits of the layer's own propositions, conclusions, actions and memories, by resident."""
    masks = np.zeros((len(runs), sum(capacity.words)), np.uint64)
    stage = (table.stage[0], table.stage[10], table.stage[11], table.stage[6])
    offset = 0
    for rows, pointer, words in zip(stage, (0, 3, 4, 1), capacity.words, strict=True):
        owner = np.repeat(np.arange(len(runs)), np.diff(table.pointers[:, pointer]))
        number = rows[:, 0]
        bits = np.left_shift(np.uint64(1), (number & 63).astype(np.uint64))
        np.bitwise_or.at(masks, (owner, offset + (number >> 6)), bits)
        offset += words
    return masks.view(np.int64)


def _idle(n: int) -> Columns:
    """A layer at which rules do nothing."""
    nothing = np.zeros(n + 1, np.int32)
    return {"pointers": np.zeros((n + 1, int(codes.POINTER_COLUMNS)), np.int32), "feature_ptr": nothing}


def _features(table: RuleTable, placed: Placed) -> Columns:
    """What propositions look at, as :class:`~editserver.engine.triton.tables.Listing` has it."""
    columns = {
        (index, int(column)): placed[index, whole.digest, int(feature)]
        for index, wholes in table.wholes.items()
        for whole in wholes
        for feature, column in zip(whole.features, whole.columns, strict=True)
    }
    pointers = table.feature_ptr
    wanted: list[list[tuple[int, int, int, int]]] = []
    for index, (first, last) in enumerate(zip(pointers[:-1].tolist(), pointers[1:].tolist(), strict=True)):
        own = []
        for place in range(first, last):
            slot, norm = int(table.feature_slot[place]), int(table.feature_norm[place])
            if slot < 0:
                own.append((columns[index, place - first], norm, int(codes.READ_MEMBER), 1))
            else:
                own.append((slot, norm, int(codes.READ_LATENT), 1))
        wanted.append(own)
    listing = Listing.of(wanted)
    return {"feature_ptr": listing.pointers, "feature_rows": listing.rows, "feature_centred": listing.centred}


def _groups(pointers: Array, rules: Array, steps: Array) -> tuple[Array, Array]:
    """CSR by resident: (first rule, last, whether a body looks at a head of its own group)."""
    conclusions = (int(codes.CONCLUSION), int(codes.CLOSED_CONCLUSION))
    counts, found = [0], []
    for first, last in zip(pointers[:-1].tolist(), pointers[1:].tolist(), strict=True):
        begin = first
        while begin < last:
            end = begin
            while end < last and rules[end, 0] == rules[begin, 0]:
                end += 1
            heads = {int(head) for head in rules[begin:end, 1]}
            named = {
                int(argument)
                for _, _, a, b in rules[begin:end].tolist()
                for op, argument in steps[a:b].tolist()
                if op in conclusions
            }
            found.append((begin, end, int(bool(heads & named))))
            begin = end
        counts.append(len(found))
    return np.array(counts, np.int32), np.array(found, np.int32).reshape(-1, 3)
