"""All cells of the study, and what they share."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from rich.console import Console

from reproduce.cells import Say, keep, measured
from reproduce.model import Runner
from reproduce.rules import as_served, hops, measure_hops, measure_rail, rail, safety, steer
from reproduce.rules.detectors import Detectors, as_json, fit_words, from_json
from reproduce.rules.settings import EFFECT_LAYER, EVIDENCE_LAYER, HOPS, Sizes
from reproduce.rules.texts import Labelled, prompt, read_all
from sae_weights.cache import cache_root
from sae_weights.catalogue import resolve

PROTOCOL = 1
"""Raise when a cell is measured differently, so that kept ones are not mixed with new ones."""

FAMILIES: dict[rail.Hints, str] = {
    "mono": "mono",
    "meta, known things": "meta",
    "meta, new things": "meta",
}
"""Kind of hint → whose detectors: those of colour words, or those of things."""
VERDICTS = ("The answer is {}", "Answer: {}", "Verdict: {}", "That is {}", "The statement is {}", "Result: {}")

SERVED = 4
"""Questions of each number of hops that are also run as whole requests."""


class Study:
    """What the cells share: model, dictionaries, fitted detectors."""

    def __init__(self, sizes: Sizes, cache: Path | None = None) -> None:
        self.sizes = sizes
        self.ids = {layer: f"smollm2-135m/l{layer}" for layer in (EVIDENCE_LAYER, EFFECT_LAYER)}
        self.saes = {layer: resolve(name)[1] for layer, name in self.ids.items()}
        facts = {
            "protocol": PROTOCOL,
            "sizes": sizes.as_dict(),
            "saes": {str(layer): sae.digest for layer, sae in self.saes.items()},
        }
        digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]
        self.folder = (cache or cache_root() / "reproduce-rules") / digest
        self.folder.mkdir(parents=True, exist_ok=True)

    @cached_property
    def model(self) -> tuple[Runner, Any]:
        """The bundled model, loaded when first needed."""
        return Runner.bundled()

    def cells(self) -> dict[str, Callable[[Say], Any]]:
        """Name → how it is measured."""
        found: dict[str, Callable[[Say], Any]] = {"steering": self._steering}
        for names in hops.NAMES:
            found |= {f"hops-{names}-{n}": partial(self._hops, names, n) for n in HOPS}
        found |= {
            "rail-" + hints.replace(", ", "-").replace(" ", "-"): partial(self._rail, hints) for hints in rail.HINTS
        }
        found["safety-requests"] = partial(self._safety, safety.requests, True)
        found["safety-chats"] = partial(self._safety, partial(safety.chats, self.sizes.chats), False)
        found["as-served"] = self._as_served
        return found | {f"thoughts-{n}": partial(self._thoughts, n) for n in HOPS}

    def questions(self, names: str, n: int) -> list[hops.Question]:
        """The test questions of a cell."""
        count = self.sizes.questions if names == "made" else self.sizes.published_names
        return hops.generate(hops.NAMES[names], n, "test", count, 1)

    def word_detectors(self, names: str, say: Say) -> Detectors:
        """Detectors of a set of names, of individuals and of the marks of a question, kept once they are fitted."""
        chosen = hops.NAMES[names]
        questions = [q for n in HOPS for q in hops.generate(chosen, n, "train", -(-self.sizes.fit // len(HOPS)), 0)]
        concepts = [*chosen, *hops.PEOPLE, *hops.PROPERTIES, hops.ASKS, hops.DENIES]
        return self._fitted(f"hops-{names}", [q.message() for q in questions], concepts, say)

    def colour_detectors(self, family: str, say: Say) -> Detectors:
        """Detectors of colours, from colour words ("mono") or from things of that colour ("meta")."""
        hints: rail.Hints = "mono" if family == "mono" else "meta, known things"
        trains = rail.generate(hints, "train", self.sizes.fit_trains, 0)
        return self._fitted(f"rail-{family}", [t.message() for t in trains], rail.COLOURS, say)

    def _fitted(self, name: str, messages: list[Labelled], concepts: Any, say: Say) -> Detectors:
        file = self.folder / f"{name}.detectors.json"
        if file.is_file():
            return from_json(json.loads(file.read_text()))
        runner, tokenizer = self.model
        sae = self.saes[EVIDENCE_LAYER]
        prompts = [prompt(tokenizer, message) for message in messages]
        reads = read_all(runner, sae, EVIDENCE_LAYER, [p.ids for p in prompts])
        found = fit_words(prompts, reads, concepts, sae.n_features, say)
        keep(file, as_json(found))
        return found

    def _steering(self, _say: Say) -> Any:
        runner, tokenizer = self.model
        sae = self.saes[EFFECT_LAYER]
        words = measure_hops.answer_tokens(tokenizer)
        spoken = {measure_hops.HOLDS: words[True], measure_hops.FAILS: words[False]}
        examples = {}
        for name, word in ((measure_hops.HOLDS, "True"), (measure_hops.FAILS, "False")):
            texts = [tokenizer.encode("\n" + text.format(word), add_special_tokens=False) for text in VERDICTS]
            examples[name] = read_all(runner, sae, EFFECT_LAYER, texts)
        questions = [
            q for chosen in hops.NAMES.values() for n in HOPS
            for q in hops.generate(chosen, n, "train", self.sizes.calibrate, 2)
        ]  # fmt: skip
        ways = {
            "effect, even": steer.by_effect(runner, sae, spoken),
            "effect, log decay": steer.by_effect(runner, sae, spoken, even=False),
            "difference, even": steer.by_difference(sae, examples),
        }
        hits = measure_hops.calibrate(runner, tokenizer, self.saes, questions, ways)
        return {"questions": len(questions), "said": hits}

    def _hops(self, names: str, n: int, say: Say) -> Any:
        detectors = self.word_detectors(names, say)
        say("questions")
        return measure_hops.measure(*self.model, self.saes, self.ids, detectors, self.questions(names, n))

    def _thoughts(self, n: int, _say: Say) -> Any:
        questions = self.questions("made", n)[: self.sizes.thoughts]
        return measure_hops.measure_thoughts(*self.model, questions, self.sizes.thought_tokens)

    def _as_served(self, say: Say) -> Any:
        detectors = self.word_detectors("made", say)
        questions = [q for n in HOPS for q in self.questions("made", n)[:SERVED]]
        return as_served.check(*self.model, self.saes, self.ids, detectors, questions)

    def _rail(self, hints: rail.Hints, say: Say) -> Any:
        detectors = self.colour_detectors(FAMILIES[hints], say)
        say("trains")
        trains = rail.generate(hints, "test", self.sizes.trains, 1)
        return measure_rail.measure(*self.model, self.saes, self.ids, detectors, trains)

    def _safety(self, items: Callable[[], list[safety.Item]], with_rule: bool, say: Say) -> Any:
        sae = self.saes[EVIDENCE_LAYER]
        read = safety.read(*self.model, sae, items(), self.sizes.chat_tokens)
        return safety.measure(read, sae.n_features, self.ids[EVIDENCE_LAYER], with_rule, say)


def run(sizes: Sizes, cache: Path | None = None, console: Console | None = None) -> dict[str, Any]:
    """The results of every cell, computed or read from ``cache`` (a folder below the cache of the machine if None).

    Raises:
        DataError: the labelled texts cannot be fetched.
    """
    study = Study(sizes, cache)
    found = measured(study.folder, study.cells(), console)
    return {
        "model": "SmolLM2-135M-Instruct",
        "settings": sizes.as_dict(),
        "saes": {str(layer): sae.digest for layer, sae in study.saes.items()},
        "cells": found,
    }
