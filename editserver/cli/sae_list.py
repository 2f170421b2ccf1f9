"""``editserver sae list`` and ``editserver sae registry``: which dictionaries there are to be had."""

from __future__ import annotations

import itertools
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Column, Table
from rich.text import Text

from editserver.cli.sae_source import console, fail, size_of

if TYPE_CHECKING:
    from sae_weights.registry import Registry

YAML = "pretrained_saes.yaml"
PACKAGE = "sae-lens"


def register(app: typer.Typer) -> None:
    """Add the commands to ``editserver sae``."""
    app.command("list")(list_dictionaries)
    app.command("registry")(show_registry)


def list_dictionaries(
    registry: Annotated[
        str | None,
        typer.Option(metavar="TEXT", help="Search the published dictionaries: every word must stand in id or model."),
    ] = None,
    formats: Annotated[bool, typer.Option("--formats", help="The checkpoint formats that can be read.")] = False,
    limit: Annotated[int, typer.Option(min=1, help="Show at most this many search results.")] = 40,
) -> None:
    """List the dictionaries that ship with editserver, search the published ones, or show the formats.

    Example: editserver sae list --registry "gemma-2-2b res layer_20 16k"
    """
    if formats:
        _formats()
    if registry is not None:
        _search(registry, limit)
    if not formats and registry is None:
        _bundled()


def _bundled() -> None:
    from sae_weights import bundled, resolve

    table = Table("id", "architecture", "hook", "latents", "digest")
    for name in bundled():
        _, sae = resolve(name)
        table.add_row(name, sae.architecture, str(sae.hook), str(sae.n_features), sae.digest[:12])
    console.print(table)
    console.print('Published ones: editserver sae list --registry "MODEL …"', highlight=False)


def _formats() -> None:
    from sae_weights import FORMATS

    table = Table(Column("--format", no_wrap=True), "written by", "files", "gives")
    for one in FORMATS:
        gives = "any architecture" if one.name == "editserver" else ", ".join(one.architectures)
        table.add_row(one.name, one.title, Text(one.files, overflow="fold"), gives)
    console.print(table)


def _search(text: str, limit: int) -> None:
    from sae_weights import SAEFormatError
    from sae_weights.registry import registry

    try:
        known = registry()
    except SAEFormatError as error:
        fail(str(error))
    found = known.search(text)
    shown = list(itertools.islice(found, limit))
    if not shown:
        near = known.nearest(text.split()[0]) if text.split() else []
        fail(
            f"--registry {text!r}: none of {len(known):,} ids has these words" + (f"; near: {near[0]}" if near else "")
        )
    for entry in shown:
        l0 = "" if entry.l0 is None else f"  L0 {entry.l0:g}"
        about = f"  {entry.model}{l0}" + (f"  {entry.neuronpedia}" if entry.neuronpedia else "")
        # Lines, not a table: an id that is folded cannot be copied.
        console.print(Text.assemble(entry.id, (about, "dim")), soft_wrap=True)
    more = sum(1 for _ in found)
    if more:
        console.print(f"{more:,} more: add a word, or --limit {len(shown) + more}", highlight=False)


def show_registry(
    refresh: Annotated[
        bool,
        typer.Option(
            "--refresh", help="Take over the newest one: downloads sae-lens' wheel with pip, runs none of it."
        ),
    ] = False,
    source: Annotated[
        Path | None,
        typer.Option(
            "--from", exists=True, dir_okay=False, help=f"Take over a {YAML}, or the one in a sae-lens wheel."
        ),
    ] = None,
) -> None:
    """Show which registry of published dictionaries is in force, or bring it up to date.

    The registry says what file of what repository an id like gemma-scope-2b-pt-res/layer_20/width_16k/average_l0_71 is.
    Its facts are SAELens' (MIT licence).
    """
    from sae_weights import SAEFormatError
    from sae_weights.registry import SHIPPED, Registry, registry, user_file

    if refresh and source is not None:
        fail("--refresh downloads, --from reads a file; give one of them")
    try:
        if refresh or source is not None:
            known = {entry.id for entry in Registry.read(user_file() if user_file().exists() else SHIPPED)}
            made = _downloaded() if source is None else _from_file(source)
            made.write(user_file())
            ids = {entry.id for entry in made}
            console.print(f"{len(ids - known):,} new ids, {len(known - ids):,} gone", highlight=False)
        found = registry()
    except (SAEFormatError, OSError) as error:
        fail(str(error))
    table = Table(show_header=False)
    where = "ships with editserver" if found.path == SHIPPED else "refreshed; delete it to go back"
    for field, value in {
        "version": f"sae-lens {found.version}",
        "dictionaries": f"{len(found):,} in {len(found.releases)} releases, {len(found.repos)} repositories",
        "file": f"{found.path} ({where})",
        "licence": "MIT, Copyright (c) 2023 Joseph Bloom",
    }.items():
        table.add_row(field, Text(value, overflow="fold"))
    console.print(table)


def _downloaded() -> Registry:
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
        command += ["--only-binary", ":all:", "--dest", folder, PACKAGE]
        with console.status(f"downloading {PACKAGE}"):
            done = subprocess.run(command, capture_output=True, text=True, timeout=600)
        if done.returncode:
            told = done.stderr.strip().splitlines()
            fail(f"--refresh: {' '.join(command[1:])}: {told[-1] if told else f'exit code {done.returncode}'}")
        wheels = sorted(Path(folder).glob("*.whl"))
        if not wheels:
            fail(f"--refresh: pip downloaded no wheel of {PACKAGE}")
        return _from_file(wheels[0])


def _from_file(path: Path) -> Registry:
    from sae_weights import SAEFormatError
    from sae_weights.registry import LONGEST_YAML, Registry

    if path.suffix != ".whl":
        if path.stat().st_size > LONGEST_YAML:
            raise SAEFormatError(f"{path}: {size_of(path.stat().st_size)}; expected at most {size_of(LONGEST_YAML)}")
        return Registry.of_yaml(path.read_bytes(), f"(from {path.name})", str(path))
    version = re.match(r"sae_lens-([^-]+)-", path.name)
    try:
        with zipfile.ZipFile(path) as wheel:
            name = next((n for n in wheel.namelist() if n.rpartition("/")[2] == YAML), None)
            if name is None:
                raise SAEFormatError(f"{path}: holds no {YAML}; expected a wheel of {PACKAGE}")
            if wheel.getinfo(name).file_size > LONGEST_YAML:
                raise SAEFormatError(f"{path}: {name} is longer than {size_of(LONGEST_YAML)}")
            text = wheel.read(name)
    except zipfile.BadZipFile:
        raise SAEFormatError(f"{path}: not a wheel") from None
    return Registry.of_yaml(text, version[1] if version else f"(from {path.name})", f"{path.name}: {name}")
