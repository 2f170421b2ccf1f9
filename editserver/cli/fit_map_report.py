"""The report of a fitted map: tables for people, JSON and a picture for files, and how to use it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from editserver.cli.fit_map_job import Measured, Outcome
from interventions.maps.calibration import Rate
from interventions.maps.plots import Curve, draw_map

_SHOWN = 10
"""Latents of a kind in the table; the report files have all."""


def write_report(outcome: Outcome) -> None:
    """``report.json`` and ``report.png`` in the folder that was asked for."""
    folder = outcome.options.report
    if folder is None:
        return
    text = json.dumps(outcome.as_dict(), indent=1, ensure_ascii=False)
    (folder / "report.json").write_text(text + "\n", encoding="utf-8")
    score = "statistic of the gate" if outcome.kind == "forget" else "known − unknown, by the probe"
    draw_map(
        folder / "report.png",
        f"{outcome.options.name}: {outcome.sae} of {outcome.map.model}",
        outcome.distributions,
        score,
        outcome.threshold,
        _panels(outcome.measured),
    )


def _panels(measured: Sequence[Measured]) -> dict[str, list[Curve]]:
    if not measured:
        return {}
    ratios = []
    for name in measured[0].perplexity:
        points = [(m.strength, p.ratio, p.low, p.high) for m in measured for p in (m.perplexity[name],)]
        ratios.append(Curve(f"texts: {name}", ((0.0, 1.0, 1.0, 1.0), *points)))
    recalls, probes = [], []
    for label in ("target", "others"):
        found = [(m.strength, getattr(m, label)) for m in measured if getattr(m, label) is not None]
        if found:
            rates = [(0.0, found[0][1].before)] + [(strength, one.after) for strength, one in found]
            recalls.append(Curve(label, tuple((s, r.value, r.low, r.high) for s, r in rates)))
    for sae in measured[0].probes:
        both = [(m.strength, m.probes[sae]) for m in measured]
        aurocs = [(0.0, both[0][1].before)] + [(strength, one.after) for strength, one in both]
        probes.append(Curve(sae, tuple((s, a.value, a.low, a.high) for s, a in aurocs)))
    return {"perplexity, edited / unedited": ratios, "recall": recalls, "AUROC, target against unknown": probes}


def show(outcome: Outcome, console: Console, *, as_json: bool) -> None:
    """Print the report: as tables, or as JSON."""
    if as_json:
        print(json.dumps(outcome.as_dict(), ensure_ascii=False))
        return
    console.print(_forget_table(outcome) if outcome.kind == "forget" else _unknown_table(outcome))
    if outcome.measured:
        console.print(_measured_table(outcome))
    for warning in outcome.warnings:
        console.print(Text(f"Warning: {warning}.", style="yellow"))
    if outcome.stored is not None:
        digest = str(outcome.stored["digest"])[:12]
        _say(
            console, f"Stored on {outcome.url}: {outcome.stored['name']}, version {outcome.stored['version']}, {digest}"
        )
    else:
        _say(console, f"Written to {outcome.options.output}, digest {outcome.map.digest[:12]}")
    if outcome.options.report is not None:
        _say(console, f"Report: {outcome.options.report / 'report.json'}, {outcome.options.report / 'report.png'}")
    print("\n" + hint(outcome))


def hint(outcome: Outcome) -> str:
    """How to use the map in a request."""
    remap = {"type": "remap", "map": outcome.options.name, "strength": 1.0}
    body = {"messages": [{"role": "user", "content": "…"}], "interventions": [remap]}
    data = json.dumps(body, ensure_ascii=False)
    return f"curl {outcome.url}/v1/chat/completions -H 'Content-Type: application/json' -d '{data}'"


def _say(console: Console, message: str) -> None:
    console.print(message, markup=False, highlight=False, soft_wrap=True)


def _forget_table(outcome: Outcome) -> Table:
    fit, map_ = outcome.fit, outcome.map
    held, gate = fit["held_out"], fit["gate"]
    table = Table(
        "", "held-out texts to forget", "held-out texts to retain", title=_title(outcome), title_justify="left"
    )
    table.add_row("tokens with a hit", f"{held['hit_rate_forget']:.1%}", f"{held['hit_rate_retain']:.1%}")
    if gate is not None:
        table.add_row("gate opens", _share(held["opened_forget"]), _share(held["opened_retain"]))
        for name, rate in held["opened_by_format"].items():
            table.add_row(f"  of format {name}", "", _share(rate))
        for padding, share in held["diluted"].items():
            if padding != "0":
                table.add_row(f"  behind {padding} other tokens", f"{share:.0%}", "")
    area = held["auroc"]
    table.add_row(
        "AUROC, forget against retain", _plain(f"{area['value']:.3f} [{area['low']:.3f}, {area['high']:.3f}]"), ""
    )
    facts = f"{len(map_.transfers)} latents: {', '.join(map(str, fit['latents']))}"
    if gate is not None and gate["calibration"] is not None:
        c = gate["calibration"]
        facts += (
            f"\ngate opens above {gate['threshold']:.4g}, from {c['n']} retain texts: false positives {c['expected']:.1%} "
            f"expected, {c['low']:.1%} to {c['high']:.1%} with {c['confidence']:.0%} confidence"
        )
    table.caption, table.caption_justify = _plain(facts), "left"
    return table


def _unknown_table(outcome: Outcome) -> Table:
    fit = outcome.fit
    table = Table(
        "latent", "kind", "score", "mean, known", "mean, unknown", title=_title(outcome), title_justify="left"
    )
    for kind in ("known", "unknown"):
        pairs = list(zip(fit["latents"][kind], fit["latents"][f"{kind}_scores"], strict=True))
        for latent, score in pairs[:_SHOWN]:
            means = fit["means"][str(latent)]
            table.add_row(str(latent), kind, f"{score:.2f}", f"{means['known']:.2f}", f"{means['unknown']:.2f}")
        if pairs[_SHOWN:]:
            table.add_row("…", f"{kind}, {len(pairs) - _SHOWN} more", "", "", "")
    n, length, apart = fit["entities"], fit["length_auroc"], fit["known_against_unknown"]
    table.caption = _plain(
        f"{n['fitted'][0]} known and {n['fitted'][1]} unknown entities to fit, {n['judged'][0]} and {n['judged'][1]} to "
        f"judge, {n['contexts']} contexts each; left out by token count: {n['dropped'][0]} and {n['dropped'][1]}\n"
        f"token count alone: AUROC {length['all']['value']:.2f} among all, {length['kept']['value']:.2f} among those kept\n"
        f"probe, held-out known against unknown: AUROC {apart['value']:.3f} [{apart['low']:.3f}, {apart['high']:.3f}]"
    )
    table.caption_justify = "left"
    return table


def _measured_table(outcome: Outcome) -> Table:
    names = list(outcome.measured[0].perplexity)
    columns = ["strength", *(f"perplexity, {name}" for name in names)]
    quizzed = any(m.target is not None for m in outcome.measured)
    probes = list(outcome.measured[0].probes)
    columns += ["recall, target", "recall, others"] if quizzed else []
    columns += [f"AUROC {sae}" for sae in probes]
    table = Table(*columns, title="what it does, edited beside unedited (interval)", title_justify="left")
    first = outcome.measured[0]
    row: list[Any] = ["0", *(f"{first.perplexity[name].before:.2f}" for name in names)]
    if quizzed:
        row += [_rate(None if side is None else side.before) for side in (first.target, first.others)]
    table.add_row(*row, *(f"{first.probes[sae].before.value:.3f}" for sae in probes))
    for m in outcome.measured:
        row = [f"{m.strength:g}"]
        for name in names:
            p = m.perplexity[name]
            row.append(_plain(f"{p.after:.2f}, x{p.ratio:.3f} [{p.low:.3f}, {p.high:.3f}]"))
        if quizzed:
            row += [_rate(None if side is None else side.after) for side in (m.target, m.others)]
        for sae in probes:
            a = m.probes[sae].after
            row.append(_plain(f"{a.value:.3f} [{a.low:.3f}, {a.high:.3f}]"))
        table.add_row(*row)
    if probes:
        table.caption = (
            "AUROC: a known-unknown probe on that dictionary, target against unknown entities; ½ = not told apart"
        )
        table.caption_justify = "left"
    return table


def _title(outcome: Outcome) -> str:
    return f"{outcome.options.name}: {outcome.sae}, layer {outcome.map.layer} of {outcome.map.model}"


def _plain(text: str) -> str:
    return text.replace("[", r"\[")


def _share(rate: Any) -> str:
    return _plain(f"{rate['value']:.1%} [{rate['low']:.1%}, {rate['high']:.1%}], n = {rate['n']}")


def _rate(rate: Rate | None) -> str:
    return "-" if rate is None else _plain(f"{rate.value:.0%} [{rate.low:.0%}, {rate.high:.0%}], n = {rate.n}")
