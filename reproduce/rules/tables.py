"""The tables of the study, made from its results; nothing is measured here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from interventions.concepts.agreement import wilson
from reproduce.rules import published
from reproduce.rules.rail import FLAGS, HINTS, LETTERS
from reproduce.rules.settings import DETECTORS, HOPS, MAIN, STRENGTH

Cells = Mapping[str, Any]

NAMES = {"made": "names made here", "published": "PrOntoQA's names"}
KINDS = {"single": "R_single: one latent", "multi": "R_multi: 10, log decay", "relation": "R_relation: tree over 10"}
SETS = {"requests": "requests", "chats": "chats (ToxicChat)"}


def tables(results: Mapping[str, Any]) -> str:
    """Everything that the command prints."""
    cells = results["cells"]
    parts = [
        _answers(cells, "made"),
        _answers(cells, "published"),
        _chain(cells),
        _steering(cells["steering"]),
        _as_served(cells["as-served"]),
        _published("PrOntoQA as published, accuracy in % (other models, other questions)", HOPS_HEAD, published.HOPS),
        _rail(cells),
        _published("Rail2Country as published, accuracy in %", ["model", "mono", "meta"], published.RAIL),
        *(_safety(cells[f"safety-{name}"], name) for name in SETS),
        f"As published: {published.SAFETY}",
        _example(cells[f"hops-made-{HOPS[1]}"]["example"]),
    ]
    return "\n\n".join(parts) + "\n"


HOPS_HEAD = ["model", *(f"{n} hop{'s' if n > 1 else ''}" for n in HOPS)]


def _answers(cells: Cells, names: str) -> str:
    found = [cells[f"hops-{names}-{n}"] for n in HOPS]
    total = [one["questions"] for one in found]
    rows = [
        ["plain", *_shares([one["plain"]["right"] for one in found], total)],
        ["plain, likelier of the two words", *_shares([one["plain"]["choice"] for one in found], total)],
    ]
    if names == "made":
        rows.append(_thoughts([cells.get(f"thoughts-{n}") for n in HOPS]))
    for how in reversed(DETECTORS):
        label = f"rules, {DETECTORS[how]}"
        right = _shares([one["rules"][how]["right"] for one in found], total)
        rows.append([f"**{label}**" if how == MAIN else label, *right])
    rows.append(["rules, facts given", *_shares([one["facts given"] for one in found], total)])
    title = (
        f"Multi-hop questions, {NAMES[names]}: accuracy in % (greedy, 95 % intervals, n = {total[0]} each; chance 50)"
    )
    return _table(title, ["SmolLM2-135M-Instruct", *HOPS_HEAD[1:]], rows)


def _thoughts(found: Sequence[Mapping[str, Any] | None]) -> list[str]:
    done = [one for one in found if one]
    label = "chain of thought"
    if done:
        share = sum(one["asked for it"] for one in done) / sum(one["questions"] for one in done)
        label += f" (n = {done[0]['questions']} each; {100 * share:.0f} % had to be asked for the answer)"
    return [label, *(_share(one["right"], one["questions"]) if one else "not measured" for one in found)]


def _chain(cells: Cells) -> str:
    """What each step gets right: the answer is their product."""
    rows = []
    for names in NAMES:
        for how in reversed(DETECTORS):
            for n in HOPS:
                cell = cells[f"hops-{names}-{n}"]
                one, total = cell["rules"][how], cell["questions"]
                rows.append(
                    [
                        NAMES[names],
                        DETECTORS[how],
                        str(n),
                        _percent(one["names"]["right"], one["names"]["positives"]),
                        f"{one['names']['false'] / total:.2f}",
                        _percent(one["facts"], total),
                        _percent(one["asked"], total),
                        _percent(one["concluded"], total),
                        f"{_percent(one['opposite'], total)} / {_percent(one['silent'], total)}",
                        _percent(one["steered"], total),
                        _percent(one["right"], total),
                    ]
                )
    head = ["names", "detectors", "hops", "names found", "false alarms a question", "facts right", "question right"]
    head += ["**concluded right**", "wrongly / not at all", "one conclusion, and said", "answered right"]
    return _table("What steers what, in %: detection, conclusion, answer", head, rows)


def _steering(cell: Mapping[str, Any]) -> str:
    total = cell["questions"]
    rows = [[way, *(_share(hits, total) for hits in by.values())] for way, by in cell["said"].items()]
    head = ["latents by, weights", *(f"α = {strength}" for strength in next(iter(cell["said"].values())))]
    return _table(
        f"Pushing the answer: how often it is said, in % (n = {total} training questions, truth given)", head, rows
    )


def _as_served(cell: Mapping[str, Any]) -> str:
    return (
        f"As whole requests (compiled as the server does, one pass of the reference executor): of {cell['questions']} questions "
        f"{cell['same conclusions']} have the same conclusions at every token, and {cell['same token']} the same answer."
    )


def _rail(cells: Cells) -> str:
    rows = []
    for hints in HINTS:
        name = "rail-" + hints.replace(", ", "-").replace(" ", "-")
        if name not in cells:
            rows.append([hints, "not measured", *[""] * 5])
            continue
        cell = cells[name]
        total = cell["trains"]
        plain, given = cell["plain"], cell["facts given"]
        rows.append([hints, "plain", "", "", "", *_shares([plain["right"], plain["choice"]], [total] * 2)])
        for how in reversed(DETECTORS):
            one = cell["rules"][how]
            colours = one["colours"]
            rows.append(
                [
                    hints,
                    f"rules, {DETECTORS[how]}",
                    _percent(colours["right"], colours["positives"]),
                    f"{colours['false'] / total:.2f}",
                    *_shares([one["concluded"], one["right"], one["choice"]], [total] * 3),
                ]
            )
        rows.append([hints, "rules, facts given", "", "", "", *_shares([given["right"], given["choice"]], [total] * 2)])
    head = ["cues", "SmolLM2-135M-Instruct", "colours found", "false alarms a train", "flag concluded right"]
    head += ["answered right", "likeliest letter right"]
    title = f"Flags of trains: accuracy in % ({len(FLAGS)} flags, {len(LETTERS)} to choose from; chance {100 // len(LETTERS)})"
    return _table(title, head, rows)


def _safety(cell: Mapping[str, Any], name: str) -> str:
    groups = cell["groups"]
    order = [f"{kind}{which}" for kind in KINDS for which in ("", ", danger alone", ", rule")]
    rows = []
    for method in ["dense", *(one for one in order if one in cell["methods"])]:
        one = cell["methods"][method]
        kind, _, which = method.partition(", ")
        label = KINDS.get(kind, "dense probe, mean residual") + (f"; {which}" if which else "")
        against = cell["against dense"].get(method)
        rows.append(
            [
                label.replace("; rule", "; **danger and not context**"),
                f"{one['latents']:.0f}" if against else "all",
                _interval(one["balanced_accuracy"], one["low"], one["high"]),
                _interval(*against) if against else "",
                *(_percent(one["flagged"][group], size) for group, size in groups.items()),
            ]
        )
    head = ["detector of what is unsafe", "latents", "balanced accuracy", "less the dense probe's"]
    head += [f"flagged: {group} ({size})" for group, size in groups.items()]
    return _table(f"Safety, {SETS[name]}: in %, five-fold, 95 % intervals", head, rows)


def _published(title: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return _table(title, head, rows)


def _example(example: Mapping[str, Any]) -> str:
    parts = [
        "### One question, its rules and the proof",
        f"> {example['context']} {example['ask']}",
        f"Steering: α = {STRENGTH}. The propositions, {example['propositions']} sums over latents, are left out.",
        "```\n" + "\n".join(example["rules"]) + "\n```",
        "```\n" + "\n".join(example["proof"]) + "\n```",
    ]
    return "\n\n".join(parts)


def _shares(right: Sequence[int], total: Sequence[int]) -> list[str]:
    return [_share(one, of) for one, of in zip(right, total, strict=True)]


def _share(right: int, total: int) -> str:
    return _interval(right / total, *wilson(right, total))


def _interval(value: float, low: float, high: float) -> str:
    return f"{100 * value:.1f} [{100 * low:.1f}, {100 * high:.1f}]"


def _percent(right: int, total: int) -> str:
    return f"{100 * right / total:.1f}" if total else "–"


def _table(title: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [f"### {title}", "", f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    return "\n".join(lines + [f"| {' | '.join(row)} |" for row in rows])
