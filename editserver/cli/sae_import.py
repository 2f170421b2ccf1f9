"""``editserver sae import``: any format, once, into the layout that loads by row."""

from __future__ import annotations

import shutil
import time
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.text import Text

from editserver.cli.sae_inspect import rows_progress, show_checks
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

KNOWLEDGE = "features.sqlite"
"""Feature knowledge beside the weights is theirs as long as the digest is the same."""


class Dtype(StrEnum):
    """How the two matrices are stored."""

    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"


def register(app: typer.Typer) -> None:
    """Add the command to ``editserver sae``."""
    app.command("import")(import_sae)


def import_sae(
    source: Source,
    out: Annotated[Path, typer.Argument(help="Folder to write: sae.json and sae.safetensors.")],
    hook: HookOption = None,
    hook_out: HookOutOption = None,
    k: KOption = None,
    norm_scaling_factor: FactorOption = None,
    groups: GroupsOption = None,
    format: FormatOption = None,
    dtype: Annotated[
        Dtype,
        typer.Option(help="float32; bfloat16, which halves the file and rounds; auto: bfloat16 where nothing is lost."),
    ] = Dtype.auto,
    force: Annotated[bool, typer.Option("--force", help="Replace a dictionary that is there.")] = False,
) -> None:
    """Convert a dictionary of any format, once, into a folder that opens at once and of which an edit reads its rows only.

    The rows of a latent lie together in the file, the digest stands beside them, and everything is folded: a dictionary
    of 131,072 latents starts in seconds, and only touched rows are read. The copy is read back and checked.

    Example: editserver sae import EleutherAI/sae-llama-3-8b-32x/layers.10 ./llama-l10
    """
    import torch

    from sae_weights import SAEFormatError, load_sae, save_native
    from sae_weights.formats.native import CONFIG_FILE, WEIGHTS_FILE
    from sae_weights.provenance import of_local_files
    from sae_weights.self_check import examine

    if (out / CONFIG_FILE).exists() and not force:
        fail(f"{out} holds a dictionary; --force replaces it")
    if out.exists() and not out.is_dir():
        fail(f"{out} is a file; expected a folder to write")
    started = time.monotonic()
    found, sae = open_source(source, hints_of(hook, hook_out, k, norm_scaling_factor, groups), format)
    if out.exists() and found.path.exists() and out.samefile(found.path):
        fail(f"{out} is the dictionary itself; name another folder")
    _check_space(sae, out)
    wanted = {"auto": None, "float32": torch.float32, "bfloat16": torch.bfloat16}[dtype.value]
    try:
        provenance = found.provenance() or sae.metadata.get("provenance") or of_local_files(found.path)
        with rows_progress("writing") as report:
            save_native(sae, out, dtype=wanted, provenance=provenance, progress=report)
        copy = load_sae(out)
        with rows_progress("checking") as report:
            examination = examine(copy, report=report)
    except (SAEFormatError, OSError) as error:
        fail(str(error))
    weights = out / WEIGHTS_FILE
    console.print(Text(f"{out}: {copy!r}", overflow="fold"), soft_wrap=True)
    console.print(
        f"{size_of(weights.stat().st_size)} in {time.monotonic() - started:.1f} s; digest {copy.digest}",
        highlight=False,
        soft_wrap=True,
    )
    rounded = dtype is Dtype.bfloat16 and _rounded(sae, copy)
    if rounded:
        console.print(f"stored as bfloat16: {rounded}", highlight=False, soft_wrap=True)
    elif (knowledge := found.path / KNOWLEDGE).is_file() and copy.digest == sae.digest:
        shutil.copyfile(knowledge, out / KNOWLEDGE)
        console.print(f"{KNOWLEDGE} came along", highlight=False)
    show_checks(examination)
    if not examination.passed:
        raise typer.Exit(1)


def _check_space(sae: SAE, out: Path) -> None:
    # One matrix where the decoder is the encoder; bfloat16 takes half: what is asked for is the most it can be.
    needed = 4 * sae.n_features * (sae.d_model + sae.d_out)
    place = out
    while not place.exists():
        place = place.absolute().parent
    free = shutil.disk_usage(place).free
    if needed > free:
        fail(f"{out}: needs up to {size_of(needed)}, {place} has {size_of(free)} left")


def _rounded(sae: SAE, copy: SAE) -> str:
    """How far a sample of rows moved, relative to their norm."""
    sample = list(range(0, sae.n_features, max(1, sae.n_features // 64)))
    before, after = sae.rows(sample), copy.rows(sample)
    apart = [
        float(((b - a).norm(dim=1) / b.norm(dim=1).clamp_min(1e-12)).max())
        for b, a in ((before.encoder, after.encoder), (before.decoder, after.decoder))
    ]
    return f"rows moved by at most {max(apart):.1e} of their norm" if max(apart) > 0 else ""
