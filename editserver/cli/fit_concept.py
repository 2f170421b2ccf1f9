"""``editserver fit concept``: labelled texts into a concept, on a running server."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from rich.table import Table

from editserver.cli.fit_concept_detector import show_detector
from editserver.cli.remote import DEFAULT_URL, ApiKey, Json, Url, connected, fail, print_json, read_texts

if TYPE_CHECKING:
    from editserver_client import ConceptFit, Job, JobStatus

console = Console()
_errors = Console(stderr=True)

_SHOWN = 15

EXAMPLES = """[bold]Examples[/bold] (start a server first: editserver serve demo)

editserver fit concept music --sae smollm2-135m/l15 --labelled examples/concepts/topics.jsonl --target music
--background examples/concepts/background.txt --report ./music

editserver fit concept toxic --sae smollm2-135m/l15 --class toxic=toxic.txt --class polite=polite.txt --target toxic
--by separability

editserver fit concept riverbank --sae smollm2-135m/l15 --labelled examples/concepts/bank.jsonl --target river
--labels word --words bank --background examples/concepts/background.txt

[bold]Labels[/bold] say what of the target's texts is of the concept: sentence (all of their tokens), word (those of --words), or
position: lines of a .jsonl of text and spans, {"text": "A bank by the river", "label": "river", "spans": [[2, 6]]}.

[bold]Then[/bold] {"type": "suppress", "concept": "music", "strength": 2} takes it away in any request, and rules know it by name:
{"type": "steer", "vector": "calm", "when": "prompt(music.text)"}.
"""


class ByName(StrEnum):
    """Why a latent is chosen."""

    difference = "difference"
    mean = "mean"
    separability = "separability"


class LabelsName(StrEnum):
    """What of a text is of the concept."""

    sentence = "sentence"
    word = "word"
    position = "position"


class PartName(StrEnum):
    """Which tokens of a word or span are labelled."""

    last = "last"
    all = "all"


class DetectorName(StrEnum):
    """How rules tell that a concept is present."""

    auto = "auto"
    single = "single"
    multi = "multi"
    relation = "relation"
    none = "none"


class WeightsName(StrEnum):
    """Weights of a sum."""

    difference = "difference"
    log_decay = "log-decay"


_DETECTOR = "For rules"


def concept(
    name: Annotated[str, typer.Argument(metavar="NAME", help="The concept's name in the library.")],
    sae: Annotated[str, typer.Option(metavar="ID", help="The served SAE in whose latents it is fitted.")],
    target: Annotated[str, typer.Option(metavar="CLASS", help="The class that the concept takes away.")],
    classes: Annotated[
        list[str] | None,
        typer.Option(
            "--class", metavar="NAME=FILE", help="Texts of one class, one a line (.jsonl: also chats). Repeatable."
        ),
    ] = None,
    labelled: Annotated[
        list[Path] | None,
        typer.Option(metavar="FILE", help=".csv or .jsonl with text and label: the classes. Repeatable."),
    ] = None,
    background: Annotated[
        list[str] | None,
        typer.Option(metavar="FILE|CLASS", help="Ordinary texts, one a line, or the name of a class."),
    ] = None,
    top: Annotated[int | None, typer.Option(metavar="N", help="Latents; default 50.")] = None,
    by: Annotated[ByName, typer.Option(help="Why a latent is chosen.")] = ByName.difference,
    max_rate: Annotated[
        float | None,
        typer.Option(metavar="SHARE", help="Leave out latents that fire on more of the background; default 0.1."),
    ] = None,
    keep_dense: Annotated[bool, typer.Option("--keep-dense", help="Leave out none.")] = False,
    bins: Annotated[int | None, typer.Option(metavar="N", help="Bins of a density; default 100.")] = None,
    held_out: Annotated[
        float, typer.Option(metavar="SHARE", help="Share of each class kept for the report; 0: no report.")
    ] = 0.2,
    strengths: Annotated[str, typer.Option(metavar="1,2,3", help="Strengths of app in the report.")] = "1,2,3",
    tokens_per_text: Annotated[
        int | None, typer.Option(metavar="N", help="Longer texts are read up to there; default 256.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the choice of held-out texts.")] = 0,
    labels: Annotated[
        LabelsName, typer.Option(help="What of the target's texts is of the concept.", rich_help_panel=_DETECTOR)
    ] = LabelsName.sentence,
    words: Annotated[
        str | None,
        typer.Option(metavar="WORD,PHRASE", help="With --labels word: which ones.", rich_help_panel=_DETECTOR),
    ] = None,
    span_tokens: Annotated[
        PartName | None,
        typer.Option(
            help="Which tokens of a word or span count; the last of a word, all of a span.", rich_help_panel=_DETECTOR
        ),
    ] = None,
    detector: Annotated[
        DetectorName,
        typer.Option(
            help="One latent, a weighted sum, a decision tree; auto: what does best on held-out folds.",
            rich_help_panel=_DETECTOR,
        ),
    ] = DetectorName.auto,
    detector_top: Annotated[
        int | None,
        typer.Option(metavar="N", help="Latents it may choose from; default 20.", rich_help_panel=_DETECTOR),
    ] = None,
    weights: Annotated[
        WeightsName | None,
        typer.Option(help="Of a sum: (difference of means)/σ², or by rank.", rich_help_panel=_DETECTOR),
    ] = None,
    tree_depth: Annotated[
        int | None, typer.Option(metavar="N", help="Of a tree; default 5.", rich_help_panel=_DETECTOR)
    ] = None,
    report: Annotated[Path | None, typer.Option(metavar="DIR", help="Write report.json and concept.png there.")] = None,
    url: Url = DEFAULT_URL,
    api_key: ApiKey = None,
    as_json: Json = False,
) -> None:
    """Fit a concept to labelled texts on a running server, measure what each method removes and costs, and store it.

    The concept also gets a detector, by which rules name it, judged on held-out texts beside a dense probe.

    The server reads the texts in the background, at low priority. Ctrl-C cancels the job.
    """
    concepts = read_classes(classes or [], labelled or [])
    ordinary = _background(background or [], concepts)
    wanted = _numbers(strengths)
    if report is not None:
        _make_folder(report)
    with connected(url, api_key) as client:
        job = client.fit_concept(
            name,
            sae=sae,
            concepts=concepts,
            target=target,
            background=ordinary,
            top=top,
            by=by.value,
            max_rate=max_rate,
            keep_dense=keep_dense,
            bins=bins,
            held_out=held_out,
            seed=seed,
            strengths=wanted,
            tokens_per_text=tokens_per_text,
            labels=labels.value,
            words=[word.strip() for word in words.split(",")] if words else None,
            span_tokens=span_tokens.value if span_tokens else None,
            detector=detector.value,
            detector_top=detector_top,
            detector_weights="log_decay" if weights is WeightsName.log_decay else "difference" if weights else None,
            tree_depth=tree_depth,
        )
        found = _follow(job)
        model = client.capabilities().model
    if report is not None:
        write_report(report, found, f"{found.concept.name}: {found.report['sae']} of {model}")
    if as_json:
        print_json({"concept": found.concept.model_dump(exclude_none=True), "report": found.report})
        return
    show(found, report)


def read_classes(classes: list[str], labelled: list[Path]) -> dict[str, list[Any]]:
    """Class → texts, of ``NAME=FILE`` and of files with labels; ends the command where there is none."""
    found: dict[str, list[Any]] = {}
    for given in classes:
        name, equals, file = given.partition("=")
        if not equals or not name or not Path(file).is_file():
            fail(f"--class {given}: expected NAME=FILE with a file that exists")
        found.setdefault(name, []).extend(read_texts([file], "--class"))
    for path in labelled:
        for text, label in _labelled(path):
            found.setdefault(label, []).append(text)
    if not found:
        fail("no texts: give --class NAME=FILE for each class, or --labelled FILE")
    return found


def _labelled(path: Path) -> list[tuple[Any, str]]:
    """(text, label) of every row."""
    try:
        with path.open(encoding="utf-8", newline="") as file:
            if path.suffix == ".csv":
                rows: list[Any] = list(csv.DictReader(file))
            else:
                rows = [json.loads(line) for line in file if line.strip()]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        fail(f"--labelled {path}: {error}")
    except ValueError as error:
        fail(f"--labelled {path}: not one JSON object a line ({error})")
    found = []
    for number, row in enumerate(rows, 1):
        text = row.get("text", row.get("messages")) if isinstance(row, Mapping) else None
        places = {key: row[key] for key in ("spans", "positions") if row.get(key)} if text else {}
        label = row.get("label") if isinstance(row, Mapping) else None
        if (
            not isinstance(text, (str, list))
            or not text
            or isinstance(label, bool)
            or not isinstance(label, (str, int))
        ):
            fail(f"--labelled {path}, row {number}: expected text (or messages) and label")
        key = "text" if isinstance(text, str) else "messages"
        found.append(({key: text, **places} if places else text, str(label)))
    return found


def _background(given: list[str], concepts: Mapping[str, Any]) -> Any:
    """Texts, or the name of a class where that is all that is given."""
    if len(given) == 1 and given[0] in concepts and not Path(given[0]).is_file():
        return given[0]
    for file in given:
        if not Path(file).is_file():
            fail(f"--background {file}: neither a file nor one of the classes: {', '.join(concepts)}")
    return read_texts(given, "--background") if given else None


def _numbers(given: str) -> list[float]:
    try:
        return [float(part) for part in given.split(",")]
    except ValueError:
        fail(f"--strengths {given}: expected numbers with commas between them")


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        fail(f"--report {folder}: {error}")


def _follow(job: Job[ConceptFit]) -> ConceptFit:
    """Show how far the job is until it is done; Ctrl-C cancels it."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Bar(*columns, console=_errors, transient=True) as bar:
        task = bar.add_task("waiting", total=None)

        def tell(status: JobStatus) -> None:
            progress = status.progress
            bar.update(task, description=progress.stage, completed=progress.done, total=progress.total)

        try:
            return job.wait(tell)
        except KeyboardInterrupt:
            job.cancel()
            _errors.print("cancelled; nothing was stored", style="yellow")
            raise typer.Exit(130) from None


def write_report(folder: Path, found: ConceptFit, title: str) -> None:
    """``report.json`` and ``concept.png``."""
    from interventions.concepts.plots import draw_report

    whole = {"concept": found.concept.model_dump(exclude_none=True), **found.report}
    (folder / "report.json").write_text(json.dumps(whole, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    draw_report(found.report, folder / "concept.png", title)


def show(found: ConceptFit, folder: Path | None) -> None:
    """The report as tables."""
    report, listing = found.report, found.concept
    console.print(_latents(found))
    dense = report["dense"]
    if dense["features"]:
        names = ", ".join(str(one["index"]) for one in dense["features"][:8])
        console.print(f"Left out as dense, though their score would do: {names}", markup=False, highlight=False)
    held_out = report["held_out"]
    if held_out is not None:
        console.print(_points(report))
    show_detector(report["detector"], listing.name)
    if report["truncated_tokens"]:
        console.print(
            f"{report['truncated_tokens']} tokens had more active latents than the server reports.", style="yellow"
        )
    console.print(
        f"Stored: {listing.name}, version {listing.version}, digest {listing.digest[:12]}",
        markup=False,
        highlight=False,
    )
    if folder is not None:
        console.print(f"Report: {folder / 'report.json'}, {folder / 'concept.png'}", markup=False, highlight=False)
    console.print("In a request:", style="dim")
    typer.echo(json.dumps({"interventions": [{"type": "suppress", "concept": listing.name, "strength": 1}]}))
    for level, words in (report["detector"] or {}).get("expressions", {}).items():
        console.print(f"In a rule, of {'one token' if level == 'token' else 'the prompt'}:", style="dim")
        typer.echo(words)


def _latents(found: ConceptFit) -> Table:
    report = found.report
    features, target = report["features"], report["target"]
    counts = ", ".join(f"{name} {one['tokens']}" for name, one in report["classes"].items())
    table = Table(
        "latent",
        "label",
        "score",
        "separability",
        f"fires on {target}",
        "on others",
        title=f"{found.concept.name}: {len(features)} latents of {report['sae']} by {report['by']}",
        caption=f"tokens fitted: {counts}; layer score {report['layer_score']:.3f}, of latents that fired "
        f"{report['active_score']:.3f}" + (f"; {len(features) - _SHOWN} more" if len(features) > _SHOWN else ""),
    )
    for one in features[:_SHOWN]:
        rates = one["rates"]
        rest = [rate for name, rate in rates.items() if name != target]
        table.add_row(
            str(one["index"]),
            (one["label"] or "—").replace("[", r"\["),
            f"{one['score']:.3g}",
            f"{one['separability']:.3f}",
            f"{rates[target]:.1%}",
            f"{sum(rest) / len(rest):.1%}",
        )
    return table


def _points(report: Mapping[str, Any]) -> Table:
    held_out, target = report["held_out"], report["target"]
    sets = list(held_out["perplexity"] or ())
    texts = sum(one["held_out"] for one in report["classes"].values())
    readout = held_out["readout"]
    where = "after the edit" if readout["after_edit_at_same_layer"] else f"layer {readout['layer']}"
    columns = [f"perplexity, {target if name == 'target' else name}" for name in sets]
    table = Table(
        "method",
        "strength",
        f"accuracy on {target}",
        "on others",
        *columns,
        title=f"{texts} held-out texts, read by a frozen probe on {readout['sae']} ({where})",
    )
    before = held_out["accuracy"]
    plain = [f"{held_out['perplexity'][name]:.4g}" for name in sets]
    table.add_row("unedited", "", f"{before['target']:.3f}", f"{before['others']:.3f}", *plain, style="bold")
    for point in held_out["points"]:
        if "refused" in point:
            table.add_row(point["method"], f"{point['strength']:g}", "refused: dose", "", *[""] * len(sets))
            continue
        after = point["after"]
        cells = [f"{point['perplexity'][name][1]:.4g} ({point['perplexity_increase'][name]:+.0%})" for name in sets]
        table.add_row(
            point["method"], f"{point['strength']:g}", f"{after['target']:.3f}", f"{after['others']:.3f}", *cells
        )
    return table
