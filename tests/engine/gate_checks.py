"""The promises about gates under prefix caching, chunking and preemption, as functions that raise when one is broken."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import numpy as np

from editserver.library import MapLibrary
from interventions.maps.gates import CusumGate, Gate, ShareGate, WindowGate, statistic
from interventions.maps.map import LatentMap, SequenceGate
from interventions.maps.transfer import interpolate
from tests.engine.lab import Lab, plain
from tests.engine.schedules import SHARED, behind_a_prefix, in_chunks, preempted
from tests.engine.shadow import fired_at
from tests.engine.support import Answer, Ask, prompt_of

TAIL = 8
SAES = ("jumprelu/l15", "topk/l15", "polysae/l15", "topk/l0", "jumprelu/l29")
"""Where the gates listen: one row at a time, and whole dictionaries; layers behind one another."""


@cache
def _library() -> Path:
    return Path(mkdtemp(prefix="maps-"))


def _bits(lab: Lab, prompt: list[int], sae: str, n: int = 24) -> np.ndarray:
    """Which of the first ``n`` latents are on at the prompt's tokens of the plain model, bool ``[tokens, n]``."""
    answer = lab.alone(Ask(prompt, inspect={"sae": sae, "features": list(range(n)), "include_bos": True}, max_tokens=1))
    assert answer.journal is not None
    readings = answer.journal.readings(0, 0, len(prompt))
    return np.array([[value != 0 for _, value in pairs] for _, pairs in readings])


def _gate(number: int, bits: np.ndarray) -> Gate:
    """Opens at the end of the prompt, because of hits that most of it had; and stays open."""
    n = len(bits)
    makers = (
        lambda threshold: CusumGate(threshold, 0.0, latch=True),
        lambda threshold: ShareGate(threshold, "seen", least=n - 3, latch=True),
        lambda threshold: WindowGate(threshold, n - 2, least=n - 2, latch=True),
        lambda threshold: ShareGate(threshold),
        lambda threshold: CusumGate(threshold, 0.0, latch=True, include_bos=True),
    )
    make = makers[number % len(makers)]
    return make(0.85 * statistic(make(0.0), bits))


def gated(lab: Lab, prompt: list[int]) -> list[Mapping[str, Any]]:
    """Five remaps, each behind a gate of another kind with its own evidence."""
    lab.engine.catalogue.maps = MapLibrary(_library())
    made = []
    for number, name in enumerate(SAES):
        bits = _bits(lab, prompt, name)
        share = bits[1:].mean(axis=0)
        evidence = int(np.abs(share - 0.6).argmin())
        served = lab.engine.catalogue.sae(name)
        gate = SequenceGate(_gate(number, bits[:, evidence]), (evidence,))
        targets = [i for i in range(40, 96) if i != evidence][:4]
        transfers = tuple(interpolate(i, 12.0 if served.layer else 4.0) for i in targets)
        found = LatentMap("demo", served.sae.digest, served.layer, transfers, gate=gate)
        lab.engine.catalogue.maps.put(found.digest[:20], found)
        made.append({"type": "remap", "map": found.digest[:20]})
    return made


def _facts(answer: Answer) -> list[tuple[int | None, float]]:
    assert answer.journal is not None
    assert answer.compiled.program is not None
    layers = answer.compiled.program.layers
    return [answer.journal.gate(layer.layer, i) for layer in layers for i in range(len(layer.gates))]


def _assert_as_alone(lab: Lab, ask: Ask, answer: Answer, tolerance: float) -> None:
    """Log-probabilities, gates, and who fired where, as far as it was computed."""
    alone = lab.alone(ask)
    lab.assert_as_alone(ask, answer, tolerance)
    assert _facts(answer) == _facts(alone), "the gates are not those of the run alone"
    assert answer.journal is not None
    assert alone.journal is not None
    n_fed = len(ask.prompt) + len(answer.token_ids) - 1
    assert answer.journal.covers(answer.journal.computed_from, n_fed)
    for i, entry in enumerate(answer.compiled.entries):
        (layer,) = entry.layers
        due = [p for p in fired_at(alone.journal, i, layer, n_fed) if p >= answer.journal.computed_from]
        assert fired_at(answer.journal, i, layer, n_fed) == due, f"remap {i} fired elsewhere than alone"


def _assert_opens_late(lab: Lab, ask: Ask) -> None:
    """Each gate opens somewhere behind the shared blocks, and lets its map act from there on."""
    alone = lab.alone(ask)
    n_fed = len(ask.prompt) + len(alone.token_ids) - 1
    assert alone.journal is not None
    starts = []
    for i, entry in enumerate(alone.compiled.entries):
        (layer,) = entry.layers
        fired = fired_at(alone.journal, i, layer, n_fed)
        assert fired == list(range(n_fed - len(fired), n_fed)), "a latched gate closed again"
        starts.append(n_fed - len(fired))
    opened = [start for start, _ in _facts(alone)]
    assert sorted(starts) == sorted(n_fed if start is None else start for start in opened)
    assert sum(start is not None for start in opened) >= 4, f"the gates open at {opened}: most never do"
    assert sum(start is not None and start >= SHARED for start in opened) >= 3, f"the gates open at {opened}: too early"


def _asks(lab: Lab) -> list[Ask]:
    """Two prompts over the same blocks, with tails of their own, and one set of maps."""
    prompts = [prompt_of(700, SHARED) + prompt_of(701 + i, TAIL + 1)[1:] for i in range(2)]
    edits = gated(lab, prompts[0])
    asks = [Ask(prompt, edits, max_tokens=4) for prompt in prompts]
    for ask in asks:
        lab.alone(ask)
        lab.alone(plain(ask))
    _assert_opens_late(lab, asks[0])
    lab.assert_edit_shows(asks[0], lab.alone(asks[0]))
    return asks


def gated_prefix(lab: Lab) -> None:
    """A request behind a prefix hit has the gates of one that computes everything; so has another prompt over the prefix."""
    behind_a_prefix(lab, _asks(lab), _assert_as_alone)


def gated_chunks(lab: Lab, size: int) -> None:
    """However the prompt is cut."""
    in_chunks(lab, _asks(lab), size, _assert_as_alone)


def gated_preempted(lab: Lab) -> None:
    """Requests that lose their blocks while they generate have the same gates when they come back."""
    preempted(lab, _asks(lab), 720, _assert_as_alone)
