"""``editserver``: the commands and their help."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from rich.console import Console

from editserver import __version__
from editserver.cli import calibrate, features, fit, rules

if TYPE_CHECKING:
    from editserver.cli.serve import Options

app = typer.Typer(
    name="editserver",
    no_args_is_help=True,
    rich_markup_mode="rich",
    add_completion=False,
    pretty_exceptions_enable=False,
    help="An OpenAI-compatible server on vLLM in which every request may edit and inspect the model's residual stream.\n\n"
    "First steps: [bold]editserver demo[/bold] shows one edited answer; [bold]editserver serve demo[/bold] serves the same "
    "model; [bold]editserver doctor[/bold] checks this machine.",
)
_errors = Console(stderr=True)

SERVE_HELP = """Serve MODEL with vLLM: every request may carry [bold]interventions[/bold] and [bold]inspect[/bold].

MODEL is a Hugging Face id, a folder, or [bold]demo[/bold] (the bundled chat model and its SAEs). Every flag that is not
listed here goes to vLLM as it is; [bold]editserver serve MODEL --vllm-help[/bold] lists those.
"""
SERVE_EXAMPLES = """[bold]Examples[/bold]

editserver serve demo --port 8000

editserver serve google/gemma-2-2b --sae gemma/l20=./gemma-scope-l20 --max-model-len 8192

editserver serve ./my-model --arm-layers 10,15,20 --max-dose 0.8 --api-key secret

[bold]Then[/bold]

curl localhost:8000/v1/chat/completions -H 'Content-Type: application/json' -d '{"messages": [{"role": "user",
"content": "Hello"}], "interventions": [{"type": "steer", "sae": "smollm2-135m/l15", "feature": 12, "strength": 8}]}'
"""


@app.command(
    help=SERVE_HELP,
    epilog=SERVE_EXAMPLES,
    context_settings={
        "allow_extra_args": True,
        "ignore_unknown_options": True,
    },
)
def serve(
    context: typer.Context,
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Hugging Face id, folder, or demo.")],
    sae: Annotated[
        list[str] | None,
        typer.Option(
            metavar="[NAME=]SOURCE",
            help="A dictionary: a bundled id, a folder or file of any format, RELEASE/SAE_ID, hf://ORG/REPO/PATH. Repeatable.",
        ),
    ] = None,
    arm_layers: Annotated[
        str | None, typer.Option(metavar="10,15|all", help="Further layers that can be steered (0-based).")
    ] = None,
    full_encode: Annotated[
        list[str] | None,
        typer.Option(
            metavar="ID|none",
            help="SAEs whose every latent may be computed (top-k, TopK edits); default: up to 32,768.",
        ),
    ] = None,
    approximate: Annotated[
        list[str] | None,
        typer.Option(metavar="ID", help="TopK SAEs whose members a calibrated threshold decides. Repeatable."),
    ] = None,
    library: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Folder of vectors, concepts, maps, rule sets; default: in the cache."),
    ] = None,
    max_dose: Annotated[
        str | None,
        typer.Option(metavar="X[:clamp|refuse]", help="Bound of ‖delta‖ / ‖h‖ per token; 0.8 keeps text coherent."),
    ] = None,
    bank_rows: Annotated[
        int | None, typer.Option(metavar="N", help="Directions of all running requests together; default 8192.")
    ] = None,
    limit: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=N", help="A limit per request: interventions, instructions, rows, top_k …"),
    ] = None,
    max_body_mib: Annotated[float | None, typer.Option(metavar="MIB", help="Largest request body; default 32.")] = None,
    vllm_help: Annotated[bool, typer.Option("--vllm-help", help="Show vLLM's own flags and exit.")] = False,
) -> None:
    """Serve a model."""
    _require_vllm()
    from editserver.api.vllm_entry import parse_serve_args, run

    if vllm_help:
        parse_serve_args(["--help=all"])
    args = _prepared(context)
    from editserver.api.plugin import HandshakeError
    from editserver.catalogue import CatalogueError
    from editserver.cli.serve import slow_numbers
    from editserver.engine.compat.refuse import UnsupportedConfig

    if (slow := slow_numbers(args)) is not None:
        _errors.print(f"editserver: {slow}", style="yellow", markup=False, highlight=False, soft_wrap=True)
    try:
        run(args)
    except (UnsupportedConfig, HandshakeError, CatalogueError) as error:
        _fail(str(error))


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    help="The bundled model and SAE: the same chat plain and edited, side by side, then the server keeps running.\n\n"
    "Further flags go to [bold]editserver serve demo[/bold].",
)
def demo(
    context: typer.Context,
    port: Annotated[int, typer.Option(help="Port of the server.")] = 8000,
    once: Annotated[bool, typer.Option("--once", help="Stop after showing the two answers.")] = False,
) -> None:
    """Show one edited answer."""
    _require_vllm()
    from editserver.demo.side_by_side import show

    raise typer.Exit(show(port=port, once=once, flags=context.args))


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    help="Check this machine: what is wrong, and the command that mends it.\n\n"
    "With a MODEL and the flags of [bold]editserver serve[/bold], also what such a server keeps in memory for editing, "
    "buffer by buffer: [bold]editserver doctor demo --max-model-len 2048[/bold].",
)
def doctor(
    context: typer.Context,
    model: Annotated[
        str | None, typer.Argument(metavar="MODEL", help="As for editserver serve, whose flags may follow.")
    ] = None,
    selftest: Annotated[
        bool, typer.Option("--selftest", help="Also run a small engine and prove an edit (about a minute).")
    ] = False,
) -> None:
    """Check this machine, and a configuration."""
    from editserver.cli.doctor import examine

    code = examine(selftest=selftest)
    if model is not None and not code:
        _show_memory([model, *context.args])
    raise typer.Exit(code)


def _show_memory(arguments: Sequence[str]) -> None:
    _require_vllm()
    from editserver.cli.memory import plan, show
    from editserver.engine.compat.refuse import UnsupportedConfig

    command: Any = typer.main.get_command(app)
    args = _prepared(command.commands["serve"].make_context("doctor", list(arguments)))
    try:
        found = plan(args)
    except (
        UnsupportedConfig,
        ValueError,
        OSError,
    ) as error:  # vLLM's own: no such model, or a flag that does not fit it
        _fail(str(error))
    show(found, Console())


app.command(help=calibrate.HELP, epilog=calibrate.EXAMPLES)(calibrate.calibrate)
app.add_typer(features.app, name="features")
app.add_typer(fit.app, name="fit")
app.add_typer(rules.app, name="rules")


def _version(show: bool) -> None:
    if show:
        typer.echo(f"editserver {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


def _prepared(given: typer.Context) -> Namespace:
    """vLLM's arguments of a server as typed; what cannot be served ends the command with a sentence."""
    from editserver.cli.serve import UsageError, prepare

    model = given.params["model"]
    if model.startswith("-"):
        _fail(f"MODEL comes first: editserver {given.info_name} MODEL {model} …")
    try:
        return prepare(model, _options(given.params), given.args)
    except UsageError as error:
        _fail(str(error))


def _options(given: Mapping[str, Any]) -> Options:
    """Our own options of ``serve``, by the names of its parameters."""
    from editserver.cli.serve import Options

    return Options(
        saes=tuple(given["sae"] or ()),
        arm_layers=given["arm_layers"],
        full_encode=tuple(given["full_encode"] or ()),
        approximate=tuple(given["approximate"] or ()),
        library=given["library"],
        max_dose=given["max_dose"],
        bank_rows=given["bank_rows"],
        limits=tuple(given["limit"] or ()),
        max_body_mib=given["max_body_mib"],
    )


def _require_vllm() -> Any:
    from editserver.engine.compat.version import UnsupportedVllm, check_vllm

    try:
        return check_vllm()
    except UnsupportedVllm as error:
        _fail(str(error))


def _fail(message: str) -> NoReturn:
    _errors.print(f"editserver: {message}", style="red", markup=False, highlight=False, soft_wrap=True)
    raise typer.Exit(2)


def with_dashes(arguments: Sequence[str]) -> list[str]:
    """vLLM accepts ``--max_dose`` for ``--max-dose``; so do our own options."""
    spelt = []
    for argument in arguments:
        end = min((i for i in (argument.find("="), argument.find(".")) if i >= 0), default=len(argument))
        name = argument[:end].replace("_", "-") if argument.startswith("--") else argument[:end]
        spelt.append(name + argument[end:])
    return spelt


def main() -> None:
    """Entry point of the ``editserver`` script."""
    if importlib.util.find_spec("editserver.cli.sae") is not None:
        app.add_typer(importlib.import_module("editserver.cli.sae").app, name="sae")
    app(with_dashes(sys.argv[1:]))


if __name__ == "__main__":
    main()
