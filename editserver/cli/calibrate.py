"""``editserver calibrate``: the strength of a feature or vector that changes the next token by a given amount."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from editserver.cli.remote import DEFAULT_URL, ApiKey, Json, Url, connected, fail, print_json, read_texts, working

console = Console()

OPS = ("steer", "set", "add")

HELP = """Find the strength at which an edit reaches a target effect, on a running server.

The effect is the mean over the prompts of KL(clean ‖ edited), in nats, of the token that comes next; 0.5 is a clear but
not yet a destructive change. Give --sae and --feature, or --vector, or a whole --intervention.
"""
EXAMPLES = """[bold]Examples[/bold] (start a server first: editserver serve demo)

editserver calibrate --sae smollm2-135m/l15 --feature 88 --chat --prompt "Tell me about Paris." --prompt "Who are you?"

editserver calibrate --sae smollm2-135m/l15 --feature 88 --op set --prompt prompts.txt --target-kl 0.3

editserver calibrate --vector formal --strength -1 --prompt chats.jsonl

editserver calibrate --intervention '{"type": "steer", "vector": "formal", "tokens": "last_prompt_token"}' --prompt "Hi"
"""


def calibrate(
    prompt: Annotated[
        list[str],
        typer.Option(
            metavar="TEXT|FILE", help="A prompt, or a file with one per line (.jsonl: also chats). Repeatable."
        ),
    ],
    sae: Annotated[str | None, typer.Option(metavar="ID", help="The served SAE; with --feature.")] = None,
    feature: Annotated[int | None, typer.Option(metavar="INDEX", help="The feature; with --sae.")] = None,
    op: Annotated[
        str,
        typer.Option(metavar="steer|set|add", help="What is done with the feature: steer along it, set it, add to it."),
    ] = "steer",
    vector: Annotated[str | None, typer.Option(metavar="NAME", help="A vector of the server's library.")] = None,
    intervention: Annotated[
        str | None, typer.Option(metavar="JSON|FILE", help="An intervention as in a request.")
    ] = None,
    strength: Annotated[float, typer.Option(help="Where to start; its sign is kept.")] = 1.0,
    chat: Annotated[
        bool, typer.Option("--chat", help="Each text is one user message, not plain text to go on with.")
    ] = False,
    target_kl: Annotated[float, typer.Option(metavar="NATS", help="The effect to reach.")] = 0.5,
    url: Url = DEFAULT_URL,
    api_key: ApiKey = None,
    as_json: Json = False,
) -> None:
    """Find the strength that reaches a target effect."""
    edit = build(sae, feature, op, vector, intervention, strength)
    prompts = read_texts(prompt, "--prompt")
    if chat:
        prompts = [[{"role": "user", "content": one}] if isinstance(one, str) else one for one in prompts]
    with connected(url, api_key) as client, working(f"measuring {len(prompts)} prompts at up to 20 strengths"):
        found = client.calibrate_strength(edit, prompts, target_kl=target_kl)
    if as_json:
        print_json(found.model_dump())
        return
    table = Table("strength", "KL (nats)", "mean dose", "largest dose", title=f"next token of {len(prompts)} prompts")
    for point in found.curve:
        numbers = (f"{point.strength:g}", f"{point.kl:.4g}", _dose(point.dose_mean), _dose(point.dose_max))
        table.add_row(*numbers, style="bold" if point.strength == found.strength else None)
    console.print(table)
    if found.within_tolerance is False:
        console.print(f"The KL jumps across {target_kl:g}; this is the nearer side.", style="yellow", highlight=False)
    if found.clamped:
        note = f"{found.clamped} tokens were scaled down to the server's largest dose."
        console.print(note, style="yellow", highlight=False)
    console.print(f"strength {found.strength:g}: KL {found.kl:.3g}, mean dose {_dose(found.dose_mean)}", style="bold")
    console.print("In a request:", style="dim")
    typer.echo(json.dumps({"interventions": [found.intervention or edit]}, ensure_ascii=False))


def build(
    sae: str | None, feature: int | None, op: str, vector: str | None, intervention: str | None, strength: float
) -> dict[str, Any]:
    """The intervention that the options describe; ends the command if they do not describe one."""
    given = [
        name
        for name, value in (
            ("--sae with --feature", sae or feature),
            ("--vector", vector),
            ("--intervention", intervention),
        )
        if value is not None
    ]
    if len(given) != 1:
        fail(f"give one of --sae with --feature, --vector, --intervention; got {' and '.join(given) or 'none'}")
    if intervention is not None:
        return _parse(intervention)
    if vector is not None:
        return {"type": "steer", "vector": vector, "strength": strength}
    if sae is None or feature is None:
        fail("--sae and --feature go together: which feature of which SAE")
    if op not in OPS:
        fail(f"--op {op}: expected one of {', '.join(OPS)}")
    if op == "steer":
        return {"type": "steer", "sae": sae, "feature": feature, "strength": strength}
    return {"type": "edit_features", "sae": sae, "features": [{"index": feature, "op": op, "value": strength}]}


def _parse(text: str) -> dict[str, Any]:
    if not text.lstrip().startswith("{"):
        try:
            text = Path(text).read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            fail(f"--intervention: neither JSON nor a file that can be read ({error})")
    try:
        parsed = json.loads(text)
    except ValueError as error:
        fail(f"--intervention: not JSON ({error})")
    if not isinstance(parsed, dict):
        fail("--intervention: expected one intervention, a JSON object")
    return parsed


def _dose(value: float | None) -> str:
    return "—" if value is None else f"{value:.3g}"
