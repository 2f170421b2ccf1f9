"""`editserver sae …`: dictionaries."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

app = typer.Typer(help="Dictionaries (SAEs): list, inspect, train.", no_args_is_help=True)
console = Console()


def parse_count(text: str) -> int:
    """``5M``, ``200k`` or a plain number."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([kKmM]?)", text.strip())
    if match is None:
        raise typer.BadParameter(f"{text!r} is not a number of tokens; write 5000000, 200k or 5M")
    return int(float(match[1]) * {"": 1, "k": 1_000, "m": 1_000_000}[match[2].lower()])


@app.command("list")
def list_bundled() -> None:
    """List the dictionaries that ship with editserver."""
    from sae_weights import bundled, resolve

    table = Table("id", "architecture", "hook", "latents", "digest")
    for name in bundled():
        _, sae = resolve(name)
        table.add_row(name, sae.architecture, str(sae.hook), str(sae.n_features), sae.digest[:12])
    console.print(table)


@app.command()
def inspect(source: Annotated[str, typer.Argument(help="A bundled id or a SAELens folder.")]) -> None:
    """Show what a dictionary is: architecture, hook, norms, digest."""
    from sae_weights import SAEFormatError, resolve

    try:
        name, sae = resolve(source)
    except SAEFormatError as error:
        console.print(f"[red]{error}[/red]")
        raise typer.Exit(2) from error
    table = Table(show_header=False)
    decoder = sae.W_dec.norm(dim=1)
    edited = "not served" if sae.hook.edit_layer is None else f"decoder layer {sae.hook.edit_layer}"
    for field, value in {
        "id": name,
        "architecture": sae.architecture + (f" (k = {sae.k})" if sae.k else ""),
        "hook": f"{sae.hook} ({edited})",
        "d_model × latents": f"{sae.d_model} × {sae.n_features}",
        "input norm": sae.input_norm,
        "edited row by row": "yes" if sae.row_separable else "no: needs the full-encode path",
        "decoder norms": f"{float(decoder.min()):.3f} … {float(decoder.max()):.3f}",
        "digest": sae.digest,
    }.items():
        table.add_row(field, value)
    console.print(table)


@app.command()
def train(
    layer: Annotated[int, typer.Option(help="Decoder layer (0-based) whose output is read.")],
    out: Annotated[Path, typer.Option(help="Folder to write, in SAELens' layout.")],
    model: Annotated[str, typer.Option(help="A model folder or Hugging Face id; 'demo' is the bundled one.")] = "demo",
    features: Annotated[int, typer.Option(help="Number of latents.")] = 4608,
    k: Annotated[int, typer.Option(help="Latents per token, on average.")] = 32,
    tokens: Annotated[str, typer.Option(help="Training tokens, e.g. 5M.")] = "5M",
    distinct: Annotated[str, typer.Option(help="Different tokens among them, at most; the rest are repeats.")] = "2M",
    conversations: Annotated[int, typer.Option(help="Chats that the model answers for training text.")] = 1500,
    work: Annotated[Path | None, typer.Option(help="Where text, activations and checkpoints are kept.")] = None,
) -> None:
    """Train a BatchTopK dictionary on a model's own activations. A run that was stopped goes on where it was.

    Example: editserver sae train --model demo --layer 15 --tokens 5M --out ./l15
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from editserver.demo.model import cache_root, ensure_demo_model
    from sae_weights.training.run import Plan, run
    from sae_weights.training.trainer import Progress as Line
    from sae_weights.training.trainer import Recipe

    path = str(ensure_demo_model()) if model == "demo" else model
    name = "smollm2-135m-instruct" if model == "demo" else model
    recipe = Recipe(n_features=features, k=k)
    plan = Plan(
        layer, parse_count(tokens), conversations, distinct=parse_count(distinct), recipe=recipe, model_name=name
    )
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        tasks: dict[str, Any] = {}

        def report(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = progress.add_task(stage, total=total)
            progress.update(tasks[stage], completed=done, total=total)

        def log(line: Line, total: int) -> None:
            report("training steps", line.tokens // recipe.batch, total)
            rate = line.tokens / max(line.seconds, 1e-9)
            progress.console.print(
                f"{line.tokens:>10,} tokens  FVU {line.fvu:.3f}  dead {line.dead}  {rate:,.0f} tokens/s",
                highlight=False,
            )

        figures = run(
            lambda: AutoModelForCausalLM.from_pretrained(path, dtype="bfloat16").eval(),
            AutoTokenizer.from_pretrained(path),
            plan,
            out,
            work or cache_root() / "training" / f"{Path(name).name}-l{layer}",
            report=report,
            log=log,
        )
    table = Table("text", "FVU", "L0", "CE recovered", title=f"{out}: dead latents {100 * figures['dead']:.2f} %")
    for kind in ("prose", "chat"):
        part = figures[kind]
        table.add_row(kind, f"{part['fvu']:.3f}", f"{part['l0']:.1f}", f"{100 * part['ce_recovered']:.1f} %")
    console.print(table)
