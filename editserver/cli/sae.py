"""`editserver sae …`: dictionaries."""

from __future__ import annotations

import re
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from editserver.cli import sae_calibrate, sae_import, sae_inspect, sae_label, sae_list

app = typer.Typer(help="Dictionaries (SAEs): find, inspect, import, calibrate, train, label.", no_args_is_help=True)
console = Console()
for _command in (sae_list, sae_inspect, sae_import, sae_calibrate, sae_label):
    _command.register(app)


class Objective(StrEnum):
    """How a dictionary is trained to be sparse."""

    batchtopk = "batchtopk"
    topk = "topk"
    jumprelu = "jumprelu"


def parse_count(text: str) -> int:
    """``5M``, ``200k`` or a plain number."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([kKmM]?)", text.strip())
    if match is None:
        raise typer.BadParameter(f"{text!r} is not a number of tokens; write 5000000, 200k or 5M")
    return int(float(match[1]) * {"": 1, "k": 1_000, "m": 1_000_000}[match[2].lower()])


@app.command()
def train(
    layer: Annotated[list[int], typer.Option(help="Decoder layer (0-based) whose output is read. Repeatable.")],
    out: Annotated[
        Path, typer.Option(help="Folder to write, in SAELens' layout; with several layers, l10, l15 … in it.")
    ],
    model: Annotated[str, typer.Option(help="A model folder or Hugging Face id; 'demo' is the bundled one.")] = "demo",
    features: Annotated[int, typer.Option(help="Number of latents.")] = 4608,
    k: Annotated[int, typer.Option(help="Latents per token, on average (for jumprelu: what L0 is driven to).")] = 44,
    objective: Annotated[
        Objective, typer.Option(help="batchtopk is saved as JumpReLU, and each latent then needs its own row only.")
    ] = Objective.batchtopk,
    tokens: Annotated[
        str, typer.Option(help="Training tokens, e.g. 10M: several passes if the text is shorter.")
    ] = "10M",
    distinct: Annotated[str, typer.Option(help="Different tokens among them, at most.")] = "2.7M",
    text: Annotated[
        list[Path] | None,
        typer.Option(
            exists=True,
            dir_okay=False,
            help="Your own text: .txt, or .jsonl with 'text' or 'messages'. Repeatable. Default: free corpora.",
        ),
    ] = None,
    conversations: Annotated[int, typer.Option(help="Chats that the model answers for training text.")] = 1500,
    chats: Annotated[
        Path | None,
        typer.Option(
            exists=True, dir_okay=False, help="Conversations already answered, JSON lines (tools/answer_chats.py)."
        ),
    ] = None,
    stream: Annotated[
        bool, typer.Option("--stream", help="Keep no activations on disk; one more pass per layer.")
    ] = False,
    work: Annotated[Path | None, typer.Option(help="Where text, activations and checkpoints are kept.")] = None,
    batch: Annotated[int, typer.Option(help="Tokens per step.")] = 2048,
    lr: Annotated[float, typer.Option(help="Peak learning rate.")] = 1e-3,
    device: Annotated[str, typer.Option(help="cpu, cuda, or auto.")] = "auto",
) -> None:
    """Train dictionaries on a model's own activations. A run that was stopped goes on where it was.

    Example: editserver sae train --model demo --layer 10 --layer 15 --tokens 10M --out ./my-saes
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from editserver.demo.model import cache_root, ensure_demo_model
    from sae_weights.precision import quick_dtype
    from sae_weights.training.run import Plan, run
    from sae_weights.training.trainer import Progress as Line
    from sae_weights.training.trainer import Recipe

    path = str(ensure_demo_model()) if model == "demo" else model
    name = "smollm2-135m-instruct" if model == "demo" else model
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        recipe = Recipe(n_features=features, k=k, batch=batch, lr=lr, objective=objective.value)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    command = f"editserver sae train --model {model} " + " ".join(f"--layer {one}" for one in layer)
    command += f" --features {features} --k {k} --objective {objective.value} --tokens {tokens} --distinct {distinct}"
    command += f" --batch {batch} --lr {lr:g}" + (" --stream" if stream else "")
    plan = Plan(
        tuple(layer),
        parse_count(tokens),
        distinct=parse_count(distinct),
        conversations=conversations,
        chats=chats,
        own_text=tuple(text or ()),
        stream=stream,
        recipe=recipe,
        model_name=name,
        options=command,
    )
    folders = [out] if len(layer) == 1 else [out / f"l{one}" for one in layer]
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        tasks: dict[str, Any] = {}

        def report(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = progress.add_task(stage, total=total)
            progress.update(tasks[stage], completed=done, total=total)

        def log(of: int, line: Line, total: int) -> None:
            report(f"training layer {of}", line.tokens // batch, total)
            left = (total * batch - line.tokens) / max(line.tokens_per_second, 1e-9)
            progress.console.print(
                f"layer {of}  {line.tokens:>11,} tokens  FVU {line.fvu:.3f}  L0 {line.l0:.1f}  dead {line.dead}  "
                f"{line.tokens_per_second:,.0f} tokens/s  {left / 60:.1f} min left",
                highlight=False,
                soft_wrap=True,
            )

        try:
            results = run(
                lambda: AutoModelForCausalLM.from_pretrained(path, dtype=quick_dtype(device)).eval().to(device),
                AutoTokenizer.from_pretrained(path),
                plan,
                folders,
                work or cache_root() / "training" / Path(name).name,
                report=report,
                log=log,
                device=device,
            )
        except (ValueError, RuntimeError, OSError) as error:
            console.print(f"editserver: {error}", style="red", markup=False, soft_wrap=True)
            raise typer.Exit(2) from error
    for folder, figures in zip(folders, results, strict=True):
        console.print(quality(f"{folder}: dead latents {100 * figures['dead']:.2f} %", figures["held_out"]))


def quality(title: str, held_out: dict[str, Any]) -> Table:
    """The held-out figures of a card."""
    table = Table("held-out text", "FVU", "L0", "CE recovered", title=title)
    for kind, part in held_out.items():
        recovered = f"{100 * part['ce_recovered']:.1f} %" if "ce_recovered" in part else "–"
        table.add_row(kind, f"{part['fvu']:.3f}", f"{part['l0']:.1f}", recovered)
    return table
