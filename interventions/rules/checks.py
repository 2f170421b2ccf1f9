"""What a rule set must not do: go round in circles through a negation, latch what it only does not know yet, act too early."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence

from interventions.rules.errors import RuleError
from interventions.rules.formula import Atom, Concluded, Evidence, Formula, Ordered, atoms, held_names, polarities
from interventions.rules.proposition import Proposition
from interventions.rules.ruleset import Action, Rule, Ruleset


def is_closed(conclusions: Collection[str]) -> Callable[[Atom], bool]:
    """Which atoms are undecided until the last prompt token, given the conclusions that are."""

    def test(atom: Atom) -> bool:
        if isinstance(atom, Concluded):
            return atom.name in conclusions
        return isinstance(atom, (Evidence, Ordered)) and atom.scope == "prompt"

    return test


def closed_conclusions(rules: Sequence[tuple[str, Formula | bool]], known: Collection[str]) -> frozenset[str]:
    """Conclusions all of whose bodies (``(head, body)``) speak of the closed prompt and of ``known`` ones only."""
    test = is_closed(known)
    open_heads = {head for head, body in rules if isinstance(body, bool) or not all(map(test, atoms(body)))}
    return frozenset(head for head, _ in rules) - open_heads


# negation ------------------------------------------------------------------------------------------------------------


def _edges(rules: Sequence[Rule]) -> dict[str, dict[str, bool]]:
    """Conclusion → the conclusions it needs → whether (also) negated."""
    found: dict[str, dict[str, bool]] = {rule.head: {} for rule in rules}
    for rule in rules:
        for atom, positive in polarities(rule.body):
            if isinstance(atom, Concluded):
                found[rule.head][atom.name] = found[rule.head].get(atom.name, False) or not positive
    return found


def _path(edges: Mapping[str, Mapping[str, bool]], start: str, goal: str) -> list[str] | None:
    """A shortest way from ``start`` to ``goal`` along what is needed."""
    came: dict[str, str] = {}
    waiting = [start]
    seen = {start}
    while waiting:
        here = waiting.pop(0)
        if here == goal:
            path = [here]
            while path[-1] != start:
                path.append(came[path[-1]])
            return path[::-1]
        for there in sorted(edges.get(here, ())):
            if there not in seen:
                seen.add(there)
                came[there] = here
                waiting.append(there)
    return None


def stratify(rules: Sequence[Rule]) -> tuple[tuple[str, ...], ...]:
    """Conclusions in groups, such that a negated conclusion is always in an earlier group than the one that needs it.

    Raises:
        RuleError: a cycle goes through a negation; the message names it.
    """
    edges = _edges(rules)
    for rule in rules:
        for needed, negated in sorted(edges[rule.head].items()):
            back = _path(edges, needed, rule.head) if negated else None
            if back is not None:
                words = " needs ".join([rule.head, f"not {needed}", *back[1:]])
                raise RuleError(f"a cycle through a negation: {words}", rule.place)
    level = dict.fromkeys(edges, 0)
    changed = True
    while changed:
        changed = False
        for head, needs in edges.items():
            for needed, negated in needs.items():
                least = level.get(needed, 0) + negated
                if level[head] < least:
                    level[head], changed = least, True
    top = max(level.values(), default=-1)
    return tuple(tuple(sorted(name for name in level if level[name] == at)) for at in range(top + 1))


def check_latches(rules: Sequence[Rule], actions: Sequence[Action], closed: Collection[str]) -> None:
    """Refuse ``not`` about anything but the closed prompt under what never ends.

    ``not x`` means "not so far". A conclusion that latches, acts from now on or refuses would keep it when x comes true,
    so whatever it rests on may negate only evidence over the whole prompt. Inside one piece of evidence
    (``seen(a and not b)``) a negation is about one token, which is over.

    Raises:
        RuleError: naming the conclusion, the way to the negation, and what is negated.
    """
    reasons = {rule.head: "latches" for rule in rules if rule.latch}
    for action in actions:
        if action.sticks:
            how = "is refused on" if action.kind == "refuse" else "acts from now on"
            reasons.setdefault(action.conclusion, how)
    edges = _edges(rules)
    test = is_closed(closed)
    for name, reason in sorted(reasons.items()):
        for rule in rules:
            if rule.head != name and _path(edges, name, rule.head) is None:
                continue
            for atom, positive in polarities(rule.body):
                if positive or test(atom):
                    continue
                way = " needs ".join(_path(edges, name, rule.head) or [name])
                message = (
                    f"{name!r} {reason}, but rests on 'not {atom.text}' ({way}), which may change; "
                    "negate prompt(…), which is final when the prompt ends, or write seen(… and not …)"
                )
                raise RuleError(message, rule.place)


# layers --------------------------------------------------------------------------------------------------------------


def evidence_layers(
    rules: Sequence[Rule], propositions: Mapping[str, Proposition], layer: Callable[[str], int]
) -> dict[str, int]:
    """Conclusion → the last layer that it has to wait for; ``layer`` gives that of an SAE. −1: no evidence at all."""
    found = {rule.head: -1 for rule in rules}
    changed = True
    while changed:
        changed = False
        for rule in rules:
            own = [layer(propositions[name].sae) for name in held_names(rule.body)]
            own += [found.get(atom.name, -1) for atom in atoms(rule.body) if isinstance(atom, Concluded)]
            latest = max(own, default=-1)
            if latest > found[rule.head]:
                found[rule.head], changed = latest, True
    return found


def check_layer_order(
    ruleset: Ruleset, layer: Callable[[str], int], layers_of: Callable[[Action], Sequence[int]]
) -> None:
    """Refuse an action that writes at an earlier layer than the last one that its conclusion waits for.

    Args:
        ruleset: the rules.
        layer: the decoder layer of an SAE, by id.
        layers_of: the layers at which a ``do`` action writes.

    Raises:
        RuleError: ``rule_layer_order``.
    """
    latest = evidence_layers(ruleset.rules, ruleset.propositions, layer)
    for action in ruleset.actions:
        if action.kind != "do":
            continue
        for at in layers_of(action):
            if at < latest[action.conclusion]:
                message = (
                    f"the action on {action.conclusion!r} writes after layer {at}, its evidence is read after layer "
                    f"{latest[action.conclusion]}; an effect comes at the layer of its evidence or later"
                )
                raise RuleError(message, action.place, "rule_layer_order")
