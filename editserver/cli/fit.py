"""`editserver fit …`: examples into artefacts of the library."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated, NoReturn

import typer
from rich.console import Console

from editserver.cli.fit_concept import EXAMPLES as CONCEPT_EXAMPLES
from editserver.cli.fit_concept import concept
from editserver.cli.fit_map import app as map_app

app = typer.Typer(help="Fit artefacts of the library to examples.", no_args_is_help=True)
app.add_typer(map_app, name="map")
_errors = Console(stderr=True)


class MethodName(StrEnum):
    """How a direction is found."""

    mean = "mean"
    pca = "pca"


class PoolName(StrEnum):
    """How the tokens of a text become one row."""

    last = "last"
    mean = "mean"


class DtypeName(StrEnum):
    """Precision in which the model runs."""

    bfloat16 = "bfloat16"
    float32 = "float32"


app.command(epilog=CONCEPT_EXAMPLES)(concept)


@app.callback()
def _group() -> None:
    """Fit artefacts of the library to examples."""


@app.command(
    epilog="[bold]Example[/bold]\n\n"
    "editserver fit vector formal --pairs examples/pairs/formal.jsonl --layer 15 --report ./formal-report"
)
def vector(
    name: Annotated[str, typer.Argument(metavar="NAME", help="The vector's name in the library.")],
    pairs: Annotated[
        Path | None, typer.Option(metavar="FILE", help=".jsonl or .csv of positive/negative pairs.")
    ] = None,
    positive: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Texts with the property, one a line (unpaired).")
    ] = None,
    negative: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Texts without it, one a line (unpaired).")
    ] = None,
    layer: Annotated[int | None, typer.Option(metavar="N", help="Decoder layer (0-based) to fit.")] = None,
    layers: Annotated[
        str | None,
        typer.Option(metavar="10,15|all", help="Layers to compare; the best by cross-validation is kept."),
    ] = None,
    method: Annotated[MethodName, typer.Option(help="Difference of means, or first component of the pairs.")] = (
        MethodName.mean
    ),
    pool: Annotated[
        PoolName | None,
        typer.Option(help="Token that stands for a text; default: mean for texts, last for completions and chats."),
    ] = None,
    model: Annotated[str, typer.Option(help="Hugging Face id, folder, or demo.")] = "demo",
    dtype: Annotated[
        DtypeName | None,
        typer.Option(
            help="Precision of the model; default: bfloat16, or float32 on a CPU that multiplies no bfloat16."
        ),
    ] = None,
    library: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Library folder; default: that of editserver serve.")
    ] = None,
    url: Annotated[str | None, typer.Option(metavar="URL", help="Store on this running server instead.")] = None,
    api_key: Annotated[str | None, typer.Option(envvar="EDITSERVER_API_KEY", help="Key of that server.")] = None,
    report: Annotated[Path | None, typer.Option(metavar="DIR", help="Write report.json and dose.png there.")] = None,
    prompts: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Prompts of the dose curve, one a line; default: 12 built in.")
    ] = None,
    tokens: Annotated[int, typer.Option(min=1, help="Longest answer on the dose curve.")] = 40,
    doses: Annotated[
        str | None, typer.Option(metavar="0.2,0.5,…", help="Doses to measure, each with both signs; 0 is added.")
    ] = None,
    temperature: Annotated[
        float, typer.Option(min=0.0, help="Of the answers: 0 is greedy; else drawn with a fixed seed.")
    ] = 0.0,
    max_perplexity: Annotated[
        float, typer.Option(min=1.0, help="Coherent up to this multiple of the unsteered perplexity.")
    ] = 1.5,
    curve: Annotated[bool, typer.Option("--curve/--no-curve", help="Measure the dose curve.")] = True,
    seed: Annotated[int, typer.Option(min=0, help="Of the split and of drawn answers.")] = 0,
    description: Annotated[str | None, typer.Option(help="What the library says about it.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Fit a steering vector to contrasting texts, measure what each dose does, and store it."""
    from editserver.cli.fit_report import show
    from editserver.cli.fit_vector import Job, UsageError, run
    from editserver.demo.model import DemoModelError
    from interventions.errors import InterventionError
    from interventions.fitting.pairs import PairsError
    from interventions.fitting.vectors import FitError

    try:
        job = Job.of(
            name=name,
            pairs=pairs,
            positive=positive,
            negative=negative,
            layer=layer,
            layers=layers,
            method=method.value,
            pool=None if pool is None else pool.value,
            model=model,
            dtype=None if dtype is None else dtype.value,
            library=library,
            url=url,
            api_key=api_key,
            report=report,
            prompts=prompts,
            tokens=tokens,
            doses=doses,
            temperature=temperature,
            max_perplexity=max_perplexity,
            curve=curve,
            seed=seed,
            description=description,
        )
        outcome = run(job, Console(stderr=True))
    except (UsageError, PairsError, FitError, DemoModelError, InterventionError) as error:
        _fail(str(error))
    show(outcome, Console(), as_json=as_json)


def _fail(message: str) -> NoReturn:
    _errors.print(f"editserver: {message}", style="red", markup=False, highlight=False, soft_wrap=True)
    raise typer.Exit(2)
