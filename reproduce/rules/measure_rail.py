"""Cells of the trains: colours found, flags concluded, countries named."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from interventions.rules.chunked import State, advance
from interventions.rules.reading import parse_ruleset
from reproduce.model import Runner
from reproduce.rules import rail, steer
from reproduce.rules.detectors import Counts, Detectors, features
from reproduce.rules.rail import FLAGS, LETTERS, Train
from reproduce.rules.settings import DETECTORS, EFFECT_LAYER, EVIDENCE_LAYER, How
from reproduce.rules.texts import prompt, readings, residuals
from sae_weights.sae import SAE


def measure(
    runner: Runner,
    tokenizer: Any,
    saes: Mapping[int, SAE],
    ids: Mapping[int, str],
    detectors: Detectors,
    trains: Sequence[Train],
) -> dict[str, Any]:
    """What comes of ``trains`` (all with a country)."""
    words = {letter: tokenizer.encode(f" {letter}", add_special_tokens=False)[0] for letter in LETTERS}
    ways = steer.by_effect(runner, saes[EFFECT_LAYER], words)
    prompts = [prompt(tokenizer, train.message()) for train in trains]
    reads = features(detectors)
    counts = {how: Counts() for how in DETECTORS}
    tallies = {how: {"concluded": 0, "wrong": 0, "silent": 0, "right": 0, "choice": 0} for how in DETECTORS}
    plain = {"right": 0, "choice": 0, "no letter": 0}
    given = {"right": 0, "choice": 0}
    for started in runner.start([p.ids for p in prompts], (EVIDENCE_LAYER, EFFECT_LAYER), 8):
        concluded: dict[int, dict[How, frozenset[str]]] = {}
        for i, h in residuals(started, EVIDENCE_LAYER):
            found = readings(saes[EVIDENCE_LAYER], ids[EVIDENCE_LAYER], h, reads)
            concluded[i] = {}
            for how in DETECTORS:
                ruleset = parse_ruleset(rail.rules(trains[i], detectors[how], ids[EVIDENCE_LAYER]))
                outcome, _ = advance(ruleset, State(), found, len(h), len(h))
                for colour, holds in outcome.propositions.items():
                    counts[how].add(holds, prompts[i].at.get(colour, ()))
                at_end = {name for name, where in outcome.conclusions.items() if where[-1]}
                countries = at_end & set(FLAGS)
                tallies[how]["concluded"] += countries == {trains[i].country}
                tallies[how]["wrong"] += bool(countries) and countries != {trains[i].country}
                tallies[how]["silent"] += not countries
                concluded[i][how] = frozenset(one for one in LETTERS if f"says.{one}" in at_end)
        truth = {i: frozenset([trains[i].letter]) for i in concluded}
        wanted = {i: [truth[i], *sets.values()] for i, sets in concluded.items()}
        says = steer.steered(runner, started, ways, words, wanted)
        for i, sets in concluded.items():
            letter = trains[i].letter
            unedited, told = says[i][frozenset()], says[i][truth[i]]
            plain["right"] += unedited.token == words[letter]
            plain["choice"] += unedited.choice == letter
            plain["no letter"] += unedited.token not in words.values()
            given["right"] += told.token == words[letter]
            given["choice"] += told.choice == letter
            for how, letters in sets.items():
                tallies[how]["right"] += says[i][letters].token == words[letter]
                tallies[how]["choice"] += says[i][letters].choice == letter
    return {
        "trains": len(trains),
        "plain": plain,
        "facts given": given,
        "rules": {how: tallies[how] | {"colours": counts[how].as_dict()} for how in DETECTORS},
    }
