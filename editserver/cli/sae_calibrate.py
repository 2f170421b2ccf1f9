"""``editserver sae calibrate``: the threshold with which a TopK dictionary is edited row by row, approximately."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from editserver.cli.sae_source import (
    FormatOption,
    HookOption,
    KOption,
    Source,
    console,
    fail,
    hints_of,
    open_source,
)

if TYPE_CHECKING:
    from sae_weights import SAE
    from sae_weights.calibration import Calibration
    from sae_weights.knowledge.measurement import Passage

HELD_OUT = 5
"""Every fifth document is kept for judging the threshold."""


def register(app: typer.Typer) -> None:
    """Add the command to ``editserver sae``."""
    app.command("calibrate")(calibrate)


def calibrate(
    source: Source,
    text: Annotated[
        list[Path] | None,
        typer.Option(
            exists=True,
            dir_okay=False,
            help="Your own text: .txt, or .jsonl with text or messages. Repeatable; default: free corpora.",
        ),
    ] = None,
    tokens: Annotated[str, typer.Option(help="How many tokens to read, e.g. 200k.")] = "200k",
    model: Annotated[str, typer.Option(help="A model folder or Hugging Face id; 'demo' is the bundled one.")] = "demo",
    hook: HookOption = None,
    k: KOption = None,
    format: FormatOption = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, or auto.")] = "auto",
) -> None:
    """Measure the threshold that can stand in for a TopK dictionary's membership rule.

    TopK needs all pre-activations of a token to say which latents are on; with a threshold each latent decides alone, and
    an edit costs its own rows only. That is an approximation: it is written beside the weights (editserver.json), used by
    `editserver serve --approximate ID` only, and named in receipts.

    Example: editserver sae calibrate ./my-topk --model demo --text mine.txt
    """
    from sae_weights import SAEFormatError
    from sae_weights.calibration import calibrate as measure
    from sae_weights.sidecar import write_sidecar

    started = time.monotonic()
    found, sae = open_source(source, hints_of(hook, None, k, None, None), format)
    if sae.refusal is not None:
        fail(f"{found.name}: {sae.refusal}")
    try:
        sae.thresholded(0.0)
        columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
        with Progress(*columns, TimeRemainingColumn(), console=console) as progress:
            values, held_out, sources = _activations(sae, text or [], tokens, model, device, progress)
            task = progress.add_task("measuring", total=None)
            result = measure(sae, values, held_out, lambda done, of: progress.update(task, completed=done, total=of))
        report = {
            **{name: round(value, 6) for name, value in result.as_dict().items() if name != "threshold"},
            "digest": sae.digest,
            "model": model,
            "text": sources,
            "date": datetime.now(UTC).date().isoformat(),
        }
        place = write_sidecar(found.path, {"calibrated_threshold": result.threshold, "calibration": report})
    except (SAEFormatError, ValueError, RuntimeError, OSError) as error:
        fail(f"{found.name}: {error}")
    _show(found.name, sae, result, time.monotonic() - started)
    console.print(
        f"written to {place}; used by: editserver serve … --sae {source} --approximate {found.name}",
        highlight=False,
        soft_wrap=True,
    )


def _activations(
    sae: SAE, text: Sequence[Path], tokens: str, model: str, device: str, progress: Progress
) -> tuple[Any, Any, list[str]]:
    """(activations to measure on, activations to judge on, names of the texts)."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    from editserver.cli.sae import parse_count
    from editserver.demo.model import cache_root, ensure_demo_model
    from sae_weights.knowledge.passages import bundled_texts, own_texts
    from sae_weights.precision import quick_dtype
    from sae_weights.training.activations import Truncated, collect

    logging.disable_progress_bar()  # two displays on one terminal garble each other
    path = str(ensure_demo_model()) if model == "demo" else model
    width = AutoConfig.from_pretrained(path).get_text_config().hidden_size
    if width != sae.d_model:
        raise ValueError(f"reads {sae.d_model} values per token, the model {model} has {width}: it is another model's")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    count, tokenizer = parse_count(tokens), AutoTokenizer.from_pretrained(path)
    task = progress.add_task("text", total=None)
    if text:
        texts = own_texts(text, tokenizer, count)
    else:
        cache = cache_root() / "training"
        chats = cache / "chats.jsonl"

        def name(source: str) -> None:
            progress.update(task, description=f"text: {source}")

        texts = bundled_texts(tokenizer, count, cache, chats if chats.exists() else None, name)
    progress.update(task, total=1, completed=1)
    measured, judged = split(texts.passages)
    if not judged:
        raise ValueError("the text is shorter than two windows of 256 tokens: nothing could be held out")
    layer = sae.hook.edit_layer
    assert layer is not None
    loaded = Truncated(AutoModelForCausalLM.from_pretrained(path, dtype=quick_dtype(device)).eval().to(device), layer)
    parts = []
    for title, sequences in (("reading", measured), ("reading held-out text", judged)):
        (part,) = collect(loaded, sequences, report=_bar(progress, title))
        parts.append(part.values)
    return parts[0], parts[1], [source["name"] for source in texts.sources]


def _bar(progress: Progress, title: str) -> Callable[[int, int], None]:
    task = progress.add_task(title, total=None)
    return lambda done, total: progress.update(task, completed=done, total=total)


def split(passages: Sequence[Passage]) -> tuple[list[list[int]], list[list[int]]]:
    """Token sequences to measure on and to judge on: every fifth document is for judging; of one document, windows."""
    documents = sorted({passage.document for passage in passages})
    if len(documents) > 1:
        judged = set(documents[:: max(2, min(HELD_OUT, len(documents)))])
        chosen = [passage.document in judged for passage in passages]
    else:
        chosen = [i % HELD_OUT == 0 for i in range(len(passages))] if len(passages) > 1 else [False] * len(passages)
    measured = [list(p.tokens) for p, held in zip(passages, chosen, strict=True) if not held]
    return measured, [list(p.tokens) for p, held in zip(passages, chosen, strict=True) if held]


def _show(name: str, sae: SAE, found: Calibration, seconds: float) -> None:
    table = Table("", "exact", "approximate", title=f"{name}: threshold {found.threshold:.6g}", title_justify="left")
    rule = sae.architecture + (f", k = {sae.k}" if sae.k else "")
    table.add_row("membership", rule, f"pre-activation above {found.threshold:.4g}")
    table.add_row("latents per token (L0)", f"{found.l0:.2f}", f"{found.l0_approximate:.2f}")
    table.add_row("FVU", f"{found.fvu:.4f}", f"{found.fvu_approximate:.4f}")
    table.add_row("members in common", "", f"{100 * found.agreement:.1f} % of those in either, per token")
    table.add_row("", "", f"{100 * found.kept:.1f} % kept, {100 * found.added:.1f} % of its own were none")
    console.print(table)
    told = f"measured on {found.tokens:,} tokens, judged on {found.held_out_tokens:,} held-out ones, {seconds:.0f} s"
    console.print(Text(told))
