"""A map that makes a known entity look unknown, from readings of known and of unknown entities.

Entities are paired by token count within each type, so that nothing found merely tells long names from short ones; half of
the pairs is for finding latents, means and a probe, the other half judges them. The probe is linear, on all latents, and
was trained on known against unknown entities, the target not among them: a map forgets if the probe can no longer tell the
edited target from unknown entities. It never adapts to the edit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from interventions.concepts.report import Probe, fit_probe
from interventions.fitting.separation import AUROC, auroc
from interventions.maps.entities import (
    BeforeAfter,
    EntityError,
    EntityLatents,
    auroc_edited,
    find_latents,
    known_to_unknown,
    match_lengths,
    mean_activation,
)
from interventions.maps.reading import FitError
from interventions.maps.transfer import Transfer, canonical
from interventions.wording import choices

Rows = npt.NDArray[np.float32]

FEWEST = 4
"""Entities of one kind and type below which nothing can be found and judged."""


@dataclass(frozen=True, eq=False)
class Mentions:
    """Activations at the last token of mentions: one row per entity and context.

    Attributes:
        entities: name of each row's entity.
        kinds: its type (player, city …).
        lengths: its tokens.
        z: float32 ``[n, S]``.
    """

    entities: tuple[str, ...]
    kinds: tuple[str, ...]
    lengths: tuple[int, ...]
    z: Rows

    def __post_init__(self) -> None:
        n = len(self.entities)
        if self.z.ndim != 2 or not n == len(self.kinds) == len(self.lengths) == len(self.z):
            raise ValueError(f"expected one kind, length and row per mention, of {n} mentions")

    def of(self, entities: Sequence[str]) -> Mentions:
        """The rows of these entities."""
        wanted = set(entities)
        kept = [i for i, name in enumerate(self.entities) if name in wanted]
        return Mentions(
            tuple(self.entities[i] for i in kept),
            tuple(self.kinds[i] for i in kept),
            tuple(self.lengths[i] for i in kept),
            self.z[kept],
        )

    def by_kind(self) -> dict[str, Rows]:
        """Type → its rows."""
        return {kind: self.z[[i for i, k in enumerate(self.kinds) if k == kind]] for kind in sorted(set(self.kinds))}

    def facts(self) -> dict[str, dict[str, int]]:
        """Type → entity → its fewest tokens in any context, in order of appearance."""
        found: dict[str, dict[str, int]] = {}
        for name, kind, length in zip(self.entities, self.kinds, self.lengths, strict=True):
            entities = found.setdefault(kind, {})
            entities[name] = min(length, entities.get(name, length))
        return found


@dataclass(frozen=True)
class EntitySettings:
    """How an entity's map is fitted.

    Attributes:
        known, unknown: at most so many latents of each.
        match: pair entities by token count (without it the report says how far length alone tells them apart).
        seed: of the split.
    """

    known: int = 10
    unknown: int = 10
    match: bool = True
    seed: int = 0


@dataclass(frozen=True, eq=False)
class KnownProbe:
    """A linear probe on latents: higher scores look more like known entities.

    Attributes:
        columns: the latents, int64 ``[m]``; of all, those that were active in training.
    """

    columns: npt.NDArray[np.int64]
    classifier: Probe

    @staticmethod
    def fit(known: Rows, unknown: Rows, latents: Sequence[int] | None = None) -> KnownProbe:
        """Ridge regression on all latents, or on some; closed form (:func:`interventions.concepts.report.fit_probe`)."""
        rows = np.concatenate([known, unknown])
        columns = np.flatnonzero((rows != 0).any(axis=0)) if latents is None else np.asarray(latents, np.int64)
        labels = torch.tensor([0] * len(known) + [1] * len(unknown))
        return KnownProbe(columns, fit_probe(torch.from_numpy(rows[:, columns]), labels, ("known", "unknown")))

    def score(self, z: Rows) -> npt.NDArray[np.float64]:
        """Known minus unknown, ``[n]``."""
        c = self.classifier
        x = (torch.from_numpy(z[:, self.columns]).double() - c.centre) / c.scale
        scores: npt.NDArray[np.float64] = (x @ (c.weight[:, 0] - c.weight[:, 1])).numpy()
        return scores


@dataclass(frozen=True)
class Sides:
    """Entity names of one half."""

    known: tuple[str, ...]
    unknown: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class EntityFit:
    """A fitted map, but for its names.

    Attributes:
        latents: K and U with their scores.
        mean_known, mean_unknown: of :attr:`EntityLatents.all`, over the half that fits; the latter is the target.
        transfers: of the map, at strength 1.
        fitted, judged: the halves.
        dropped_known, dropped_unknown: entities without a partner of their token count.
        length_before, length_after: AUROC with which token count alone tells unknown from known entities, among all and
            among those kept.
        probe: trained on the half that fits, on all latents.
        narrow_probe: the same on the mapped latents alone, which the map sets: what it says is what was asked for, not
            whether that is enough.
        separation: AUROC of the probe on the other half, known against unknown.
        warnings: what makes the figures doubtful.
    """

    latents: EntityLatents
    mean_known: tuple[float, ...]
    mean_unknown: tuple[float, ...]
    transfers: tuple[Transfer, ...]
    fitted: Sides
    judged: Sides
    dropped_known: tuple[str, ...]
    dropped_unknown: tuple[str, ...]
    length_before: AUROC
    length_after: AUROC
    probe: KnownProbe
    narrow_probe: KnownProbe
    separation: AUROC
    warnings: tuple[str, ...]

    def judge(self, target: Rows, edited: Rows, unknown: Mentions, probe: KnownProbe | None = None) -> BeforeAfter:
        """AUROC with which the probe tells the target from the unknown entities of the half that judges.

        Args:
            target, edited: the target's mentions without and with the map, ``[n, S]``.
            unknown: the unknown entities as given to :func:`fit_entities`, of the same dictionary as ``target``.
            probe: another one, for example of a later layer's dictionary.
        """
        judge = probe or self.probe
        others = unknown.of(self.judged.unknown)
        return auroc_edited(judge.score(target), judge.score(edited), judge.score(others.z))

    def as_dict(self) -> dict[str, Any]:
        """The figures, as JSON."""
        return {
            "latents": {
                "known": list(self.latents.known),
                "unknown": list(self.latents.unknown),
                "known_scores": list(self.latents.known_scores),
                "unknown_scores": list(self.latents.unknown_scores),
                "dense_left_out": self.latents.dense,
            },
            "means": {
                str(latent): {"known": known, "unknown": unknown}
                for latent, known, unknown in zip(self.latents.all, self.mean_known, self.mean_unknown, strict=True)
            },
            "entities": {
                "fitted": [len(self.fitted.known), len(self.fitted.unknown)],
                "judged": [len(self.judged.known), len(self.judged.unknown)],
                "dropped": [len(self.dropped_known), len(self.dropped_unknown)],
            },
            "length_auroc": {"all": asdict(self.length_before), "kept": asdict(self.length_after)},
            "known_against_unknown": asdict(self.separation),
        }


def fit_entities(
    known: Mentions,
    unknown: Mentions,
    settings: EntitySettings | None = None,
    background: npt.ArrayLike | None = None,
) -> EntityFit:
    """Match lengths, find the latents, and map them to their mean over unknown entities.

    Args:
        known, unknown: of the same types; the target is in neither.
        settings: defaults as in :class:`EntitySettings`.
        background: share of ordinary tokens on which each latent fires, ``[S]``; dense latents are left out by it.

    Raises:
        FitError: types that do not match, too few entities of equal length, or no latent that tells them apart.
    """
    ask = settings or EntitySettings()
    ours, theirs = known.facts(), unknown.facts()
    if set(ours) != set(theirs):
        raise FitError(f"known entities have the types {choices(sorted(ours))}, unknown {choices(sorted(theirs))}")
    both = {name for facts in ours.values() for name in facts} & {name for facts in theirs.values() for name in facts}
    if both:
        raise FitError(f"{choices(sorted(both)[:5])} among the known and the unknown entities: keep each in one list")
    kept: dict[str, tuple[list[str], list[str]]] = {}
    for kind in sorted(ours):
        names = [list(ours[kind]), list(theirs[kind])]
        if ask.match:
            paired = match_lengths(list(ours[kind].values()), list(theirs[kind].values()))
            names = [[names[0][i] for i in paired.known], [names[1][j] for j in paired.unknown]]
        if min(map(len, names)) < FEWEST:
            raise FitError(_too_few(kind, ours[kind], theirs[kind], len(names[0]), ask.match))
        kept[kind] = names[0], names[1]
    fitted, judged = _halves(kept, ask)
    before = _length_auroc(ours, theirs)
    stay = {name for pair in kept.values() for side in pair for name in side}
    lengths = [{kind: {n: v for n, v in side[kind].items() if n in stay} for kind in side} for side in (ours, theirs)]
    after = _length_auroc(*lengths)
    rows = known.of(fitted.known), unknown.of(fitted.unknown)
    try:
        latents = find_latents(rows[0].by_kind(), rows[1].by_kind(), ask.known, ask.unknown, background)
    except EntityError as error:
        raise FitError(f"{error}; give more entities, or another layer's dictionary") from error
    means = [mean_activation(side.z, latents.all) for side in rows]
    probe = KnownProbe.fit(rows[0].z, rows[1].z)
    separation = auroc(probe.score(known.of(judged.known).z), probe.score(unknown.of(judged.unknown).z))
    return EntityFit(
        latents,
        tuple(float(v) for v in means[0]),
        tuple(float(v) for v in means[1]),
        canonical(known_to_unknown(latents.all, means[1])),
        fitted,
        judged,
        tuple(n for facts in ours.values() for n in facts if n not in stay),
        tuple(n for facts in theirs.values() for n in facts if n not in stay),
        before,
        after,
        probe,
        KnownProbe.fit(rows[0].z, rows[1].z, latents.all),
        separation,
        tuple(_warnings(ask, before, separation, background)),
    )


def _halves(kept: Mapping[str, tuple[list[str], list[str]]], ask: EntitySettings) -> tuple[Sides, Sides]:
    """Half of each type's entities, pairs together: both halves keep equal lengths."""
    generator = np.random.default_rng(ask.seed)
    halves: tuple[list[list[str]], list[list[str]]] = ([[], []], [[], []])
    for kind in sorted(kept):
        shared = generator.permutation(len(kept[kind][0]))
        for side in (0, 1):
            names = kept[kind][side]
            order = shared if ask.match else generator.permutation(len(names))
            half = (len(names) + 1) // 2
            halves[0][side] += [names[i] for i in order[:half]]
            halves[1][side] += [names[i] for i in order[half:]]
    first, second = (Sides(tuple(half[0]), tuple(half[1])) for half in halves)
    return first, second


def _length_auroc(known: Mapping[str, Mapping[str, int]], unknown: Mapping[str, Mapping[str, int]]) -> AUROC:
    longer, shorter = ([n for facts in side.values() for n in facts.values()] for side in (unknown, known))
    return auroc(longer, shorter)


def _too_few(kind: str, known: Mapping[str, int], unknown: Mapping[str, int], pairs: int, match: bool) -> str:
    counts = f"{len(known)} known and {len(unknown)} unknown entities of type {kind}"
    if not match:
        return f"{counts}; at least {FEWEST} of each are needed"
    lengths = [", ".join(map(str, sorted(side.values()))) for side in (known, unknown)]
    return (
        f"{counts} make {pairs} pairs of equal token count; at least {FEWEST} are needed. "
        f"The known ones have {lengths[0]} tokens, the unknown ones {lengths[1]}: give unknown names of those lengths"
    )


def _warnings(ask: EntitySettings, before: AUROC, separation: AUROC, background: npt.ArrayLike | None) -> list[str]:
    found = []
    apart = max(before.value, 1 - before.value)
    if not ask.match and apart > 0.6:
        found.append(
            f"token count alone tells unknown from known entities (AUROC {apart:.2f}), and lengths are not matched: "
            "latents and probe may know no more than that"
        )
    if separation.low <= 0.5:
        found.append("the probe does not tell held-out known from unknown entities (the interval holds ½)")
    if background is None:
        found.append("no ordinary text was given, so latents that fire everywhere were not left out")
    return found
