"""What the commands about one dictionary share: the SOURCE argument, the options that fill gaps, errors, numbers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, NoReturn

import typer
from rich.console import Console
from rich.text import Text

if TYPE_CHECKING:
    from sae_weights import SAE, Hints
    from sae_weights.catalogue import Located

console = Console()

Source = Annotated[
    str,
    typer.Argument(
        metavar="SOURCE",
        help="A folder or file, a bundled id (smollm2-135m/l15), a registry id (RELEASE/SAE_ID, see "
        "`editserver sae list --registry TEXT`), or hf://ORG/REPO/PATH; the last two take @REVISION.",
    ),
]
HookOption = Annotated[
    str | None, typer.Option(help="Where it reads, if its files do not say: blocks.12.hook_resid_post.")
]
HookOutOption = Annotated[str | None, typer.Option(help="Where it writes (transcoders): blocks.12.hook_mlp_out.")]
KOption = Annotated[int | None, typer.Option(min=1, help="Latents per token, if its files do not say.")]
FactorOption = Annotated[
    float | None, typer.Option(help="The constant that scaled its inputs in training, √d / E‖x‖, if not in its files.")
]
GroupsOption = Annotated[int | None, typer.Option(min=1, help="Take the first groups of a Matryoshka dictionary only.")]
FormatOption = Annotated[
    str | None,
    typer.Option("--format", help="Read it as this format (`editserver sae list --formats`); default: recognised."),
]


def hints_of(
    hook: str | None, hook_out: str | None, k: int | None, norm_scaling_factor: float | None, groups: int | None
) -> Hints:
    """The options as hints to the loader."""
    from sae_weights import Hints

    return Hints(hook=hook, hook_out=hook_out, k=k, norm_scaling_factor=norm_scaling_factor, groups=groups)


def open_source(source: str, hints: Hints | None = None, format: str | None = None) -> tuple[Located, SAE]:
    """Find and open it, or end the command with what is wrong."""
    from sae_weights import SAEFormatError
    from sae_weights.catalogue import locate

    try:
        found = locate(source)
        return found, found.open(format=format, hints=hints)
    except SAEFormatError as error:
        fail(str(error))


def fail(message: str) -> NoReturn:
    """End the command with exit code 2."""
    console.print(Text(f"editserver: {message}", style="red"), soft_wrap=True)
    raise typer.Exit(2)


def size_of(count: float) -> str:
    """Bytes for people: 1.2 GB."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" or count >= 10 else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"
