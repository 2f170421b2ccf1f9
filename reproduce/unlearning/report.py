"""The tables and the picture: every number in them comes from the results."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from interventions.concepts.report import mean_interval
from reproduce.unlearning.published import CLAIMS, DSG_TABLE

DIGITS = 4

COLUMNS = (
    ("recall", "recall", "recall"),
    ("in a chat", "recall in a chat", "recall"),
    ("first token", "recall: first token", "recall"),
    ("others beside it", "others beside it", "recall"),
    ("others", "others", "recall"),
    ("ppl neutral", "perplexity neutral", "change"),
    ("ppl others", "perplexity other entities", "change"),
    ("AUROC own layer", "AUROC against unknown, own layer", "auroc"),
    ("AUROC next SAE", "AUROC against unknown, next SAE", "auroc"),
    ("fresh, next SAE", "fresh probe, next SAE", "auroc"),
    ("dose", "dose", "dose"),
)
"""Heading, metric, kind of number."""


def interval(values: Sequence[float]) -> list[float]:
    """[mean, low, high] of the 95 % interval over targets."""
    found = mean_interval(list(values))
    ends = (found.mean, found.low, found.high) if math.isfinite(found.low) else (found.mean,) * 3
    return [round(v, DIGITS) for v in ends]


def summary(row: dict[str, Any]) -> dict[str, Any]:
    """A cell with each metric's mean over targets, its interval and the number of targets."""
    metrics = {metric: [*interval(list(of.values())), len(of)] for metric, of in row["metrics"].items()}
    return {"cell": row["cell"], "metrics": metrics}


def tables(results: dict[str, Any]) -> str:
    """All tables as Markdown."""
    cells = results["cells"]
    plain = next(c["metrics"] for c in cells if c["cell"]["method"] == "none")

    def rows(*methods: str) -> list[list[str]]:
        chosen = [c for c in cells if c["cell"]["method"] in methods]
        order = {method: i for i, method in enumerate(methods)}
        chosen.sort(key=lambda c: (order[c["cell"]["method"]], *_setting(c["cell"])))
        return [[*_named(c["cell"]), *_figures(c["metrics"])] for c in chosen]

    head = [name for name, _, _ in COLUMNS]
    parts = [
        "### What the model knows",
        _known(results["knowledge"]),
        "### Without an edit",
        _plain(results, plain),
        "### Prompt only",
        *(_prompt(c["metrics"], plain) for c in cells if c["cell"]["method"] == "prompt"),
        "### Known → unknown maps",
        _table(["layer", "λ", "tokens", *head], rows("map", "map of every latent")),
        "### Static clamps",
        _table(["layer", "c", "tokens", *head], rows("clamp")),
        "### Gated clamps",
        _table(["layer", "c", "gate", *head, "edited"], _gated(cells)),
        "### Gates: calibration",
        _gates(results["gates"]),
        "### Gates: dilution",
        _dilution(results["dilution"]) if results["dilution"] else "Not measured.",
        "### Published",
        _published(),
    ]
    done, wanted = results["measured"]
    if done < wanted:
        parts.insert(0, f"{done} of {wanted} cells are measured; `make reproduce-unlearning` goes on with the others.")
    return "\n\n".join(parts)


def _setting(cell: dict[str, Any]) -> tuple[Any, ...]:
    return (cell["layer"], cell["gate"], not cell["whole"], cell["tokens"] != "last", cell["strength"])


def _named(cell: dict[str, Any]) -> list[str]:
    tokens = {"last": "last of a mention", "all": "all of a mention", "": "all"}[cell["tokens"]]
    if cell["method"] == "map of every latent":
        tokens += ", every latent"
    return [str(cell["layer"]), f"{cell['strength']:g}", tokens]


def _gated(cells: Sequence[dict[str, Any]]) -> list[list[str]]:
    chosen = sorted((c for c in cells if c["cell"]["method"] == "gated clamp"), key=lambda c: _setting(c["cell"]))
    found = []
    for c in chosen:
        cell = c["cell"]
        where = {"hits": "hits", "all": "all once open"}[cell["tokens"]]
        name = f"{cell['gate']}, {where}" + (" (two passes: DSG)" if cell["whole"] else "")
        edited = _figure(c["metrics"].get("edited questions"), "recall")
        found.append([str(cell["layer"]), f"{cell['strength']:g}", name, *_figures(c["metrics"]), edited])
    return found


def _figures(metrics: dict[str, list[float]]) -> list[str]:
    return [_figure(metrics.get(metric), kind) for _, metric, kind in COLUMNS]


def _figure(found: Sequence[float] | None, kind: str) -> str:
    """mean ± half of the 95 % interval."""
    if found is None:
        return "–"
    mean, low, high = found[:3]
    half = (high - low) / 2
    if kind == "change":
        return f"{100 * mean:+.1f} %" + (f" ± {100 * half:.1f}" if half else "")
    return f"{mean:.2f}" + (f" ± {half:.2f}" if half >= 0.005 else "")


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _known(knowledge: dict[str, Any]) -> str:
    asked = [
        [kind, attribute, f"{right} of {n}", str(guesses)]
        for kind, attribute, right, guesses, n in sorted(knowledge["asked"])
    ]
    heads = list(next(iter(knowledge["counts"].values())))
    counts = [[kind, *(str(of[h]) for h in heads)] for kind, of in sorted(knowledge["counts"].items())]
    total = ["all", *(str(sum(of[h] for of in knowledge["counts"].values())) for h in heads)]
    latents = [
        [layer, str(of["known"]), _score(of["best known score"]), str(of["unknown"]), _score(of["best unknown score"])]
        for layer, of in knowledge["latents"].items()
    ]
    questions = ", ".join(f"{what} {n}" for what, n in knowledge["questions"].items())
    targets = ", ".join(f"{name} ({n})" for name, n in knowledge["targets"].items())
    return "\n\n".join(
        [
            _table(["type", "attribute", "right", "of these guesses"], asked),
            _table(["type", *heads], [*counts, total]),
            f"Targets (questions): {targets}.",
            f"Questions: {questions}.",
            _table(["layer", "known latents", "best score", "unknown latents", "best score"], latents),
        ]
    )


def _score(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def _plain(results: dict[str, Any], plain: dict[str, list[float]]) -> str:
    layers = list(results["knowledge"]["latents"])
    rows = []
    for layer in layers:
        of = [
            _figure(plain.get(f"{metric}, {where} (layer {layer})"), "auroc")
            for where in ("own layer", "next SAE")
            for metric in ("AUROC against unknown", "AUROC of known against it", "fresh probe")
        ]
        rows.append([layer, *of])
    head = ["layer"]
    for where in ("", ", next SAE"):
        head += [f"target against unknown{where}", f"known against target{where}", f"fresh probe{where}"]
    first = _figure(plain["recall: first token"], "recall")
    return f"Recall is 1 by choice of the questions; an accepted first token has probability {first}.\n\n" + _table(
        head, rows
    )


def _prompt(prompt: dict[str, list[float]], plain: dict[str, list[float]]) -> str:
    labels = ("recall", "recall in a chat", "recall: first token", "others", "others: first token")
    rows = [[label, _figure(plain.get(label), "recall"), _figure(prompt.get(label), "recall")] for label in labels]
    for metric in sorted(m for m in prompt if m.startswith("AUROC against unknown, own")):
        rows.append([metric, _figure(plain.get(metric), "auroc"), _figure(prompt[metric], "auroc")])
    return _table(["metric", "without", "told to know nothing"], rows)


def _gates(found: Sequence[dict[str, Any]]) -> str:
    rows = [
        [
            str(g["layer"]),
            g["gate"],
            _figure(g["threshold"], "recall"),
            f"{g['alpha']:g}",
            _figure(g["false positives"], "recall"),
            f"{g['calibration sequences']} / {g['held-out sequences']}",
        ]
        for g in found
    ]
    return _table(["layer", "gate", "threshold", "asked for", "held-out false positives", "sequences"], rows)


def _dilution(found: dict[str, Any]) -> str:
    rows = []
    for row in found["rows"]:
        for g in row["gates"]:
            predicted = next(p for p in found["predicted"] if p["layer"] == g["layer"])["opened"][str(row["padding"])]
            recovered = g.get("recovered")
            rows.append(
                [
                    str(g["layer"]),
                    g["gate"],
                    str(row["padding"]),
                    f"{g['opened']:.2f}",
                    f"{predicted:.2f}" if g["gate"] == "share" else "",
                    f"{g['opened on benign']:.2f}",
                    f"{g['answered']:.2f}" if "answered" in g else "",
                    f"{row['answered without an edit']:.2f}" if "answered" in g else "",
                    "" if recovered is None else f"{recovered:.2f}",
                ]
            )
    order = {"share": 0, "window": 1, "cusum": 2}
    rows.sort(key=lambda r: (int(r[0]), order[r[1]], int(r[2])))
    head = ["layer", "gate", "padding", "opens on target questions", "predicted from bits", "opens on benign ones"]
    head += ["answered behind it", "answered unedited", "recovered"]
    medians = ", ".join(
        f"layer {p['layer']}: {'never open' if p['median padding to evade'] is None else format(p['median padding to evade'], 'g')}"
        for p in found["predicted"]
    )
    return (
        _table(head, rows) + f"\n\nMedian benign tokens that close the share gate, predicted from the bits: {medians}."
    )


def _published() -> str:
    head = ["method (Gemma-2-2B-it)", "WMDP-Bio, % of base", "MMLU, % of base", "MT-Bench"]
    rows = [[name, f"{bio:.2f}", f"{mmlu:.2f}", f"{bench:.2f}"] for name, bio, mmlu, bench in DSG_TABLE]
    return _table(head, rows) + "\n\n" + _table(["claim", "published", "where"], CLAIMS)


def draw(results: dict[str, Any], file: Path) -> None:
    """Recall against collateral of every cell, and the gates under dilution."""
    import matplotlib as mpl

    mpl.use("agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(9.0, 3.6), dpi=100)
    styles = {"map": "C0o", "map of every latent": "C0*", "clamp": "C1s", "gated clamp": "C2^", "prompt": "kX"}
    for method, style in styles.items():
        chosen = [c["metrics"] for c in results["cells"] if c["cell"]["method"] == method]
        xs = [m["recall"][0] for m in chosen]
        ys = [m["others"][0] for m in chosen]
        left.plot(xs, ys, style, alpha=0.7, label=method, markersize=6)
    left.plot([1], [1], "k+", markersize=10, label="no edit")
    left.set(xlabel="recall about the target", ylabel="recall about others", xlim=(-0.05, 1.08), ylim=(-0.05, 1.08))
    left.legend(frameon=False, fontsize=8, loc="lower left")
    found = results["dilution"] or {"rows": [], "layer": "–"}
    for i, gate in enumerate(("share", "window", "cusum")):
        entries = [
            next(g for g in row["gates"] if g["gate"] == gate and g["layer"] == found["layer"]) for row in found["rows"]
        ]
        xs = list(range(len(entries)))
        right.plot(xs, [g["opened"] for g in entries], f"C{i}o-", label=f"{gate}, target")
        right.plot(xs, [g["opened on benign"] for g in entries], f"C{i}o:", label=f"{gate}, benign")
    right.set(xlabel="benign tokens before the question", ylabel="share at which the gate opens", ylim=(-0.05, 1.05))
    right.set_xticks(range(len(found["rows"])), [str(row["padding"]) for row in found["rows"]])
    right.legend(frameon=False, fontsize=8)
    right.set_title(f"layer {found['layer']}", fontsize=9)
    figure.tight_layout()
    figure.savefig(file, metadata={"Software": None})
    plt.close(figure)
