"""``editserver sae inspect``: what a dictionary is, and whether it does what it says."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from editserver.cli.sae_source import (
    FactorOption,
    FormatOption,
    GroupsOption,
    HookOption,
    HookOutOption,
    KOption,
    Source,
    console,
    fail,
    hints_of,
    open_source,
    size_of,
)

if TYPE_CHECKING:
    from sae_weights import SAE
    from sae_weights.catalogue import Located
    from sae_weights.self_check import Examination, Norms

HOW = {
    "row": "row by row: an edit reads the rows of its own latents only",
    "dictionary": "all latents at once: edited exactly with the full-encode path",
}
MARKS = {True: ("ok", "green"), False: ("FAILED", "bold red"), None: ("left out", "yellow")}


def register(app: typer.Typer) -> None:
    """Add the command to ``editserver sae``."""
    app.command()(inspect)


def inspect(
    source: Source,
    verify: Annotated[
        bool, typer.Option("--verify", help="Compute the digest from every byte, and downloaded files' hashes, anew.")
    ] = False,
    hook: HookOption = None,
    hook_out: HookOutOption = None,
    k: KOption = None,
    norm_scaling_factor: FactorOption = None,
    groups: GroupsOption = None,
    format: FormatOption = None,
) -> None:
    """Show what a dictionary is (architecture, hook, norms, digest, where it is from) and check that it works.

    Every row is read once, a block at a time: a wide dictionary takes time, not memory. Exit code 1 if a check fails.

    Example: editserver sae inspect gemma-scope-2b-pt-res/layer_20/width_16k/average_l0_71
    """
    from sae_weights import SAEFormatError
    from sae_weights.self_check import examine

    found, sae = open_source(source, hints_of(hook, hook_out, k, norm_scaling_factor, groups), format)
    try:
        if verify and found.fetched is not None:
            with console.status("checking the hashes of the downloaded files"):
                found.fetched.verify()
        with rows_progress("reading") as report:
            examination = examine(sae, verify=verify, report=report)
            digest = sae.digest
    except (SAEFormatError, OSError) as error:
        fail(str(error))
    console.print(facts(found, sae, digest, examination))
    show_checks(examination)
    if not examination.passed:
        raise typer.Exit(1)


@contextmanager
def rows_progress(title: str) -> Iterator[Callable[[int, int], None]]:
    """A bar over the rows of a dictionary, as ``report(done, total)``; it goes when it is done."""
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(title, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)


def show_checks(examination: Examination) -> None:
    """One line per check."""
    for check in examination.checks:
        mark, style = MARKS[check.passed]
        console.print(Text.assemble((f"{mark:>8}", style), f"  {check.name}: {check.found}"), soft_wrap=True)


def facts(found: Located, sae: SAE, digest: str, examination: Examination) -> Table:
    """The two-column table."""
    table = Table(show_header=False)
    for field, value in _facts(found, sae, digest, examination):
        table.add_row(field, Text(value, overflow="fold"))
    return table


def _facts(found: Located, sae: SAE, digest: str, examination: Examination) -> Iterator[tuple[str, str]]:
    from sae_weights import FORMATS
    from sae_weights.architectures import ARCHITECTURES

    assert sae.origin is not None
    yield "id", found.name
    yield "format", next(f"{one.name} ({one.title})" for one in FORMATS if one.name == sae.origin.format)
    form = ARCHITECTURES[sae.architecture]
    yield "architecture", sae.architecture + (f", k = {sae.k}" if sae.k else "") + f" ({form.title}: {form.reference})"
    yield "computed", HOW.get(sae.execution, sae.execution)
    yield "reads", ", ".join(_place(hook.edit_layer, str(hook)) for hook in sae.hooks)
    if sae.hook_out is not None:
        yield "writes", str(sae.hook_out)
    width = f"{sae.d_model} × {sae.n_features}" + (f" → {sae.d_out}" if sae.d_out != sae.d_model else "")
    yield "d_model × latents", f"{width} ({size_of(4 * sae.n_features * (sae.d_model + sae.d_out))} as float32)"
    yield "input norm", sae.input_norm
    if settings := {name: value for name, value in sae.settings.items() if value not in (None, [], ())}:
        yield "settings", ", ".join(f"{name} = {value}" for name, value in settings.items())
    yield (
        "encoder norms",
        "none: the decoder is the encoder" if examination.encoder is None else _norms(examination.encoder),
    )
    yield "decoder norms", _norms(examination.decoder)
    if model := sae.metadata.get("model_name"):
        yield "model", str(model)
    yield "editable", _editable(sae)
    theta = sae.metadata.get("calibrated_threshold")
    if isinstance(theta, (int, float)):
        yield "calibrated threshold", f"{theta:g} (an approximation, used by `serve --approximate`)"
    yield "digest", digest
    yield from _provenance(sae.metadata.get("provenance"))


def _place(layer: int | None, hook: str) -> str:
    return f"{hook} ({'not served' if layer is None else f'decoder layer {layer}'})"


def _norms(norms: Norms) -> str:
    return f"{norms.smallest:.4g} … {norms.median:.4g} … {norms.largest:.4g} (smallest, median, largest)"


def _editable(sae: SAE) -> str:
    if sae.refusal is not None:
        return f"no: {sae.refusal}"
    if sae.row_separable:
        return "yes"
    return "yes, with the full-encode path (on by default up to 32,768 latents; --full-encode above)"


def _provenance(stated: Any) -> Iterator[tuple[str, str]]:
    if not isinstance(stated, Mapping):
        return
    if "repo" in stated:
        path = f"/{stated['path']}" if stated.get("path") else ""
        yield "from", f"hf://{stated['repo']}{path}@{stated.get('commit')} (asked for: {stated.get('revision')})"
    elif "path" in stated:
        yield "from", str(stated["path"])
    registry = stated.get("registry")
    if isinstance(registry, Mapping):
        shown = {name: registry[name] for name in ("id", "l0", "neuronpedia") if name in registry}
        yield "registry", ", ".join(f"{name} {value}" for name, value in shown.items())
    for file in stated.get("files") or []:
        yield "file", f"{file.get('path')}  {size_of(file.get('size', 0))}  sha256 {file.get('sha256')}"
