"""What both kinds of map share: where a map goes, how it is measured on the way there, and what is known of it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from editserver import __version__
from editserver.cli.fit_map_measure import Perplexity, Question, Recall, perplexity, recall
from editserver.cli.fit_map_server import Edit, Engine, Pass, Prompt
from editserver.cli.fit_report import rounded
from editserver.library import NAME
from interventions.maps.body import to_body, to_bytes
from interventions.maps.entities import BeforeAfter
from interventions.maps.map import LatentMap, MentionTokens, Scope
from interventions.maps.mentions import Case, surfaces
from interventions.maps.reading import FitError

TARGET_CASES: tuple[Case, ...] = ("as_given", "lower", "upper", "title")
"""Case variants in which a target's names are recognised."""


@dataclass(frozen=True)
class Options:
    """What the commands share.

    Attributes:
        name: of the map in the library.
        output: the file to write instead of storing the map.
        strengths: at which it is measured; empty = it is not.
        questions: about the target and about others; may be empty.
        longest: tokens of a text that are read.
        answer_tokens: longest answer.
        report: folder for ``report.json`` and ``report.png``.
    """

    name: str
    output: Path | None
    strengths: tuple[float, ...]
    questions: tuple[Question, ...] = ()
    longest: int = 512
    answer_tokens: int = 32
    report: Path | None = None

    def check(self, engine: Engine) -> None:
        """Refuse what would fail after a long fit.

        Raises:
            FitError: a name that no library takes, a folder that is missing, a server without maps.
        """
        if not NAME.fullmatch(self.name):
            raise FitError(f"{self.name!r} is not a name: letters, digits, dot, underscore, hyphen; at most 128")
        if self.output is not None and (self.output.is_dir() or not self.output.absolute().parent.is_dir()):
            raise FitError(f"--output {self.output}: give a file in a folder that exists")
        if self.report is not None:
            self.report.mkdir(parents=True, exist_ok=True)
        if "remap" not in engine.capabilities.intervention_types and (self.strengths or self.output is None):
            raise FitError(
                f"the server (version {engine.capabilities.version}) does not execute maps; upgrade it, or fit without "
                "measuring into a file: --no-measure --output FILE"
            )


@dataclass(frozen=True)
class Measured:
    """What the map does at one strength.

    Attributes:
        strength: λ.
        perplexity: set of texts → change.
        target, others: recall on questions about the target and about others.
        probes: "mapped latents" or SAE id (all latents) → AUROC of a known-unknown probe, target against unknown entities.
    """

    strength: float
    perplexity: Mapping[str, Perplexity] = field(default_factory=dict)
    target: Recall | None = None
    others: Recall | None = None
    probes: Mapping[str, BeforeAfter] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "strength": self.strength,
            "perplexity": {name: asdict(value) for name, value in self.perplexity.items()},
            "recall": {
                name: None if value is None else asdict(value)
                for name, value in (("target", self.target), ("others", self.others))
            },
            "probe_auroc": {name: asdict(value) for name, value in self.probes.items()},
        }


@dataclass(frozen=True)
class Outcome:
    """A fitted map, where it went, and what it does.

    Attributes:
        kind: "forget" or "unknown".
        map: as stored.
        stored: the server's listing; ``None`` when it went to a file.
        fit: figures of the fit.
        measured: by strength.
        answers: every question with its answers, for the report file.
        distributions: label → scores, for the picture; ``threshold`` is drawn across them.
        warnings: what makes the figures doubtful.
    """

    kind: str
    options: Options
    map: LatentMap
    sae: str
    url: str
    stored: Mapping[str, Any] | None
    fit: Mapping[str, Any]
    measured: tuple[Measured, ...]
    answers: tuple[Mapping[str, Any], ...]
    distributions: Mapping[str, Sequence[float]]
    threshold: float | None
    warnings: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """The report, as JSON."""
        found: dict[str, Any] = rounded(
            {
                "map": self.stored or {"file": str(self.options.output), "digest": self.map.digest},
                "kind": self.kind,
                "model": self.map.model,
                "sae": {"id": self.sae, "digest": self.map.sae, "layer": self.map.layer},
                "fit": self.fit,
                "measured": [one.as_dict() for one in self.measured],
                "warnings": list(self.warnings),
                "provenance": self.map.provenance,
                "answers": list(self.answers),
            }
        )
        return found


def mention_scope(engine: Engine, names: Sequence[str], tokens: str) -> MentionTokens:
    """The mentions of the names, as the server's tokenizer writes them."""
    found = surfaces(names, engine.encode, TARGET_CASES)
    return MentionTokens(found.sequences, "all" if tokens == "all" else "last", tuple(names))


def build(
    engine: Engine, transfers: Any, scope: Scope, gate: Any, provenance: Mapping[str, Any], report: Mapping[str, Any]
) -> LatentMap:
    """The artefact."""
    plain: dict[str, Any] = rounded(provenance)
    figures: dict[str, Any] = rounded(report)
    sae = engine.sae
    return LatentMap(engine.capabilities.model, sae.digest, sae.layer, transfers, scope, gate, plain, figures)


def provenance(engine: Engine, settings: Mapping[str, Any], files: Mapping[str, Path | None]) -> dict[str, Any]:
    """Where the map comes from."""
    return {
        "editserver": __version__,
        "sae": engine.sae.id,
        "settings": dict(settings),
        "files": {
            option: {"name": path.name, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
            for option, path in files.items()
            if path is not None
        },
    }


@contextmanager
def trial(engine: Engine, options: Options, candidate: LatentMap) -> Iterator[str]:
    """The candidate under a name of its own while it is measured."""
    name = f"{options.name[:110]}.being-fitted"
    engine.client.library.maps.put(name, to_body(candidate))
    try:
        yield name
    finally:
        engine.client.library.maps.delete(name)


def store(engine: Engine, options: Options, final: LatentMap) -> Mapping[str, Any] | None:
    """To the file that was asked for, else to the server's library."""
    if options.output is not None:
        options.output.write_bytes(to_bytes(final))
        return None
    listing = engine.client.library.maps.put(options.name, to_body(final))
    return {"name": listing.name, "version": listing.version, "digest": listing.digest}


def text_change(
    engine: Engine, prompts: Sequence[Prompt], before: Sequence[Pass], edit: Edit, title: str
) -> Perplexity:
    """Perplexity of the texts with the edit, beside a pass without it."""
    after = engine.run(prompts, f"{title} at {edit.strength:g}", losses=True, edit=edit)
    return perplexity([p.losses for p in before], [p.losses for p in after], [p.edited for p in after])


class Quiz:
    """Questions, with the unedited answers."""

    def __init__(self, engine: Engine, options: Options, targets: Sequence[str]) -> None:
        self._engine, self._options = engine, options
        names = {name.casefold() for name in targets}
        self.questions = options.questions
        self._about = [question.entity.casefold() in names for question in self.questions]
        if self.questions and not any(self._about):
            entities = sorted({q.entity for q in self.questions})[:8]
            raise FitError(
                f"--questions: none is about {' or '.join(targets) or 'a target'} (field entity); they are about "
                f"{', '.join(entities)}"
            )
        self._before = self._ask(None)
        self._after: dict[float, list[str]] = {}

    def _ask(self, edit: Edit | None) -> list[str]:
        if not self.questions:
            return []
        title = "questions" if edit is None else f"questions at {edit.strength:g}"
        texts = [question.text for question in self.questions]
        return self._engine.answers(texts, title, self._options.answer_tokens, edit)

    def recall(self, edit: Edit, found: Measured) -> Measured:
        """``found`` with the recall at this strength."""
        if not self.questions:
            return found
        after = self._after[edit.strength] = self._ask(edit)
        sides: dict[str, Recall | None] = {}
        for name, wanted in (("target", True), ("others", False)):
            chosen = [i for i, about in enumerate(self._about) if about is wanted]
            sides[name] = None
            if chosen:
                texts = ([side[i] for i in chosen] for side in (self._before, after))
                sides[name] = recall([self.questions[i] for i in chosen], *texts)
        return replace(found, target=sides["target"], others=sides["others"])

    def answers(self) -> tuple[dict[str, Any], ...]:
        """Everything that was said."""
        return tuple(
            {
                "question": question.text,
                "entity": question.entity,
                "expected": list(question.answers),
                "unedited": self._before[i],
                "edited": {f"{strength:g}": said[i] for strength, said in self._after.items()},
            }
            for i, question in enumerate(self.questions)
        )

    def warnings(self, measured: Sequence[Measured]) -> list[str]:
        """What the unedited answers say against the figures."""
        if not self.questions or not measured:
            return []
        target = measured[0].target
        if target is not None and target.before.value < 0.5:
            share = f"{target.before.value:.0%}"
            return [f"the unedited model answers {share} of the questions about the target: there is little to forget"]
        return []
