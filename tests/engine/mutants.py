"""Test-only mutants: ways in which an engine like this one can be wrong and still look right.

Each is applied by monkeypatching a healthy engine in this process, and is caught by a test that it names.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from editserver.engine.compat import core
from editserver.engine.salt import edit_salt, plain_salt
from interventions.program import Program
from tests.engine.lab import Lab

NOBODY = "no request has this id"


@dataclass(frozen=True)
class Mutant:
    """How the engine is broken, the check that notices, and the test of that check."""

    apply: Callable[[pytest.MonkeyPatch, Lab], None]
    check: str
    arguments: dict[str, Any]
    caught_by: str


def _no_salt(patch: pytest.MonkeyPatch, lab: Lab) -> None:
    """An edit leaves no trace in the prefix cache's keys."""
    patch.setattr(core, "edit_salt", lambda user_salt, digest, prompt_len: plain_salt(user_salt))


def _salt_without_prompt_len(patch: pytest.MonkeyPatch, lab: Lab) -> None:
    """KV of generated tokens comes back as KV of the next turn's prompt."""
    patch.setattr(core, "edit_salt", lambda user_salt, digest, prompt_len: edit_salt(user_salt, digest, None))


def _digest_by_name(patch: pytest.MonkeyPatch, lab: Lab) -> None:
    """Library vectors enter the digest under their names."""
    names: dict[bytes, str] = {}
    healthy, find = Program.digest, type(lab.engine.catalogue).vector

    def vector(self: Any, name: str) -> Any:
        found = find(self, name)
        for row in found.values():  # the program has v or −v, whichever begins above 0
            names.update({(sign * np.asarray(row, "<f4")).tobytes(): name for sign in (1, -1)})
        return found

    def digest(self: Program) -> str:
        called = sorted(names[values] for values in self.vectors.values() if values in names)
        if not called:
            return healthy(self)
        ops = [[abs(op.beta) for channel in layer.channels for op in channel.ops] for layer in self.layers]
        return hashlib.sha256(repr((called, ops)).encode()).hexdigest()

    patch.setattr(type(lab.engine.catalogue), "vector", vector)
    patch.setattr(Program, "digest", digest)


Batch = tuple[list[str], Any, Any, Any]


def _plans_from(patch: pytest.MonkeyPatch, change: Callable[..., Sequence[str]]) -> None:
    """Plan each step as if the rows of the batch were the requests that ``change`` says."""
    from editserver.engine.worker import EngineWorker

    healthy = EngineWorker.begin_step

    def begin_step(self: Any, request_ids: list[str], query_start: Any, positions: Any, *rest: Any) -> None:
        healthy(self, list(change(self, request_ids, query_start, positions)), query_start, positions, *rest)

    patch.setattr(EngineWorker, "begin_step", begin_step)


def _rotated_rows(patch: pytest.MonkeyPatch, lab: Lab) -> None:
    """Row r of the batch gets the edit of row r + 1."""
    _plans_from(patch, lambda worker, ids, query_start, positions: [*ids[1:], *ids[:1]])


def _previous_plan(patch: pytest.MonkeyPatch, lab: Lab) -> None:
    """Rows are mapped to requests before the batch is updated: a new request's first chunk has no edit."""
    previous: list[str] = []

    def change(worker: Any, ids: list[str], query_start: Any, positions: Any) -> list[str]:
        stale = [*previous, *[NOBODY] * len(ids)][: len(ids)]
        previous[:] = ids
        return stale

    _plans_from(patch, change)


def _later_chunks_unedited(patch: pytest.MonkeyPatch, lab: Lab) -> None:
    """Only the first chunk of a prompt is edited."""

    def change(worker: Any, ids: list[str], query_start: Any, positions: Any) -> list[str]:
        kept = []
        for row, request_id in enumerate(ids):
            start = int(positions[query_start[row]])
            resident = worker.residents.requests.get(request_id)
            later = resident is not None and 0 < start < resident.prompt_len
            kept.append(NOBODY if later else request_id)
        return kept

    _plans_from(patch, change)


def _phase_per_step(patch: pytest.MonkeyPatch, lab: Lab) -> None:
    """A row with one token is taken for a decode, one with several for a prefill."""
    from editserver.engine import plan

    healthy = plan.select_tokens
    build = plan.Plan.build
    prompt_lens: list[int] = []

    def remember(self: Any, residents: Any, request_ids: Any, *rest: Any) -> None:
        requests = residents.requests
        prompt_lens[:] = [requests[r].prompt_len if r in requests else 0 for r in request_ids]
        build(self, residents, request_ids, *rest)

    def select(query_start: Any, positions: Any, *rest: Any) -> int:
        assumed = positions.copy()
        for row, prompt_len in enumerate(prompt_lens):
            mine = slice(int(query_start[row]), int(query_start[row + 1]))
            decode = mine.stop - mine.start == 1
            assumed[mine] = (
                np.maximum(assumed[mine], prompt_len) if decode else np.minimum(assumed[mine], prompt_len - 1)
            )
        return int(healthy(query_start, assumed, *rest))

    patch.setattr(plan.Plan, "build", remember)
    patch.setattr(plan, "select_tokens", select)


def _gates_forget_prefixes(patch: pytest.MonkeyPatch, lab: Lab) -> None:
    """Behind a prefix hit, gates begin as if nothing had been hit before."""
    from editserver.engine.gates import HitMemory

    patch.setattr(HitMemory, "of", lambda self, layer, blocks: np.zeros(blocks.n_slots, np.uint64))


def _gates_begin_with_each_chunk(patch: pytest.MonkeyPatch, lab: Lab) -> None:
    """Every step is a sequence of its own to a gate."""
    from editserver.engine.gates import Hearing, Track
    from interventions.maps.gates import GateState

    def fresh(self: Any, segment: Any, listener: Any) -> Track:
        return Track(GateState(segment.first_position))

    patch.setattr(Hearing, "_track", fresh)


MUTANTS = {
    "no salt": Mutant(
        _no_salt,
        "cache_matrix",
        {"kinds": ("none", "A")},
        "test_prefix_cache.test_any_mix_of_edits_over_shared_prompts_answers_as_with_a_cold_cache",
    ),
    "salt without prompt_len": Mutant(
        _salt_without_prompt_len,
        "two_turns",
        {},
        "test_prefix_cache.test_a_later_turn_never_reuses_kv_of_the_other_phase",
    ),
    "phase per step instead of per token": Mutant(
        _phase_per_step, "chunk_of_one", {}, "test_schedule.test_a_last_chunk_of_one_token_is_still_prompt"
    ),
    "rows rotated by one": Mutant(
        _rotated_rows,
        "neighbours",
        {"toggles": ("steer",)},
        "test_neighbours.test_toggling_one_rows_edit_leaves_seven_others_bit_identical_in_fp32",
    ),
    "plan taken from the previous step": Mutant(
        _previous_plan,
        "neighbours",
        {"toggles": ("steer",)},
        "test_neighbours.test_toggling_one_rows_edit_leaves_seven_others_bit_identical_in_fp32",
    ),
    "edits dropped in chunks after the first": Mutant(
        _later_chunks_unedited, "chunks", {"size": 16}, "test_schedule.test_edits_are_the_same_at_every_chunk_size"
    ),
    "digest by name instead of content": Mutant(
        _digest_by_name,
        "content_not_name",
        {},
        "test_prefix_cache.test_a_vector_that_changed_under_its_name_shares_nothing_with_its_past",
    ),
    "gates forget what a cached prefix held": Mutant(
        _gates_forget_prefixes, "gated_prefix", {}, "test_gates.test_a_prefix_hit_brings_the_state_of_the_gates_with_it"
    ),
    "gates begin anew with every chunk": Mutant(
        _gates_begin_with_each_chunk,
        "gated_chunks",
        {"size": 17},
        "test_gates.test_gates_open_at_the_same_token_at_every_chunk_size",
    ),
}
