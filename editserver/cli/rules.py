"""``editserver rules check``: is this a rule set, what does it say, and would it run here."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from rich.cells import cell_len
from rich.console import Console

from editserver.cli.remote import ApiKey, connected, fail, print_json

if TYPE_CHECKING:
    from interventions.rules.build import Context
    from interventions.rules.ruleset import Action, Ruleset

app = typer.Typer(help="Rules over features: check.", no_args_is_help=True, rich_markup_mode="rich")
console = Console()
_errors = Console(stderr=True)

_WIDTH = 110
"""Most characters of a line that are shown of it."""

EXAMPLES = """[bold]Examples[/bold]

editserver rules check examples/rules/voyage.rules --bundled

editserver rules check safety.json --json > normal.json

echo 'rule: last(3, feature(smollm2-135m/l15, 617) > 4) -> sailing on sailing: flag' | editserver rules check -

editserver rules check safety.rules --server http://localhost:8000
"""


@app.callback()
def _root() -> None:
    pass


@app.command(epilog=EXAMPLES)
def check(
    file: Annotated[str, typer.Argument(metavar="FILE", help="A rule set, text or JSON; - reads standard input.")],
    server: Annotated[
        str | None,
        typer.Option(
            "--server", "--url", metavar="URL", help="Ask this server: its SAEs, its library, its limits, its layers."
        ),
    ] = None,
    bundled: Annotated[
        bool, typer.Option("--bundled", help="Look up SAEs, features and layers among the bundled dictionaries.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the normal form as JSON.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing where all is well.")] = False,
    api_key: ApiKey = None,
) -> None:
    """Check a rule set and print its normal form; what it amounts to goes to standard error.

    Without --server and --bundled any SAE and feature goes, and names of library concepts are unknown. What is wrong is shown
    as FILE:line:column (in JSON: the path), with exit code 1.
    """
    if server is not None and bundled:
        fail("--server and --bundled: give one of them")
    name, content = _content(file)
    raw = _parsed(name, content)
    ruleset = _asked(name, raw, server, api_key) if server is not None else _checked(name, raw, bundled)
    if quiet:
        return
    if as_json:
        print_json(ruleset.as_json())
    else:
        typer.echo(ruleset.text, nl=False)
    for line in summary(ruleset):
        _errors.print(line, style="dim", markup=False, highlight=False, soft_wrap=True)


def _content(file: str) -> tuple[str, str]:
    """Name and text of the file."""
    try:
        if file == "-":
            return "<stdin>", sys.stdin.buffer.read().decode("utf-8-sig")
        return file, Path(file).read_bytes().decode("utf-8-sig")
    except (OSError, ValueError) as error:
        fail(f"{file}: {error}")


def _parsed(name: str, content: str) -> Any:
    """The text, or parsed JSON: no text form begins with a brace or a bracket."""
    if not content.lstrip().startswith(("{", "[")):
        return content
    try:
        return json.loads(content)
    except json.JSONDecodeError as error:
        _refuse(name, f"not JSON: {error.msg}", content, error.lineno, error.colno)
    except RecursionError:
        _refuse(name, "not a rule set: nested too deep")


def _checked(name: str, raw: Any, bundled: bool) -> Ruleset:
    """The normal form, with no server to ask."""
    from interventions.errors import InterventionError
    from interventions.rules.checks import check_layer_order
    from interventions.rules.errors import RuleError
    from interventions.rules.reading import OPEN, parse_ruleset

    context = _bundled() if bundled else OPEN
    try:
        ruleset = parse_ruleset(raw, context)
        known = context.dictionaries
        if known is not None:
            check_layer_order(ruleset, lambda sae: known[sae].layer, lambda action: _layers(action, context))
    except RuleError as error:
        _refuse(name, error.detail, raw, error.line, error.column, error.place.path)
    except InterventionError as error:
        _refuse(name, error.message)
    return ruleset


def _bundled() -> Context:
    from interventions.rules.build import Context, Dictionary
    from sae_weights import bundled, resolve

    saes = {name: resolve(name)[1] for name in bundled()}
    return Context({name: Dictionary(sae.hook.layer, sae.n_features) for name, sae in saes.items()})


def _layers(action: Action, context: Context) -> Sequence[int]:
    """Where an action writes, as far as that can be told without a library."""
    given = json.loads(action.payload)
    layers = [given["layer"]] if "layer" in given else given.get("layers", [])
    concept = given.get("concept")
    sae = given.get("sae", concept.get("sae") if isinstance(concept, dict) else None)
    known = context.dictionaries or {}
    return [*layers, known[sae].layer] if sae in known else layers


def _asked(name: str, raw: Any, url: str, api_key: str | None) -> Ruleset:
    """The normal form that the server answers."""
    from editserver_client import RuleError
    from interventions.rules.reading import parse_ruleset

    if not isinstance(raw, (str, dict)):
        return _checked(name, raw, False)  # says what is wrong with a list
    with connected(url, api_key) as client:
        try:
            answer = client.rulesets.check(raw)
        except RuleError as error:
            path = "" if isinstance(raw, str) else error.param or ""
            message = error.message
            for start in ([error.param] if error.param else []), []:
                spot = [f"line {error.line}, column {error.column}"] if error.line else []
                message = message.removeprefix(", ".join([*start, *spot]) + ": ")
            _refuse(name, message, raw, error.line, error.column, path)
    return parse_ruleset(answer.text)


def _refuse(
    name: str, message: str, raw: Any = None, line: int | None = None, column: int | None = None, path: str = ""
) -> NoReturn:
    """Say what is wrong and where, show the line, and exit with 1."""
    where = [name, *([f" {path}"] if path else []), *([str(line), str(column)] if line else [])]
    _errors.print(
        f"{':'.join(where)}: {message}", style="red", markup=False, highlight=False, soft_wrap=True, emoji=False
    )
    source = _at(raw, path)
    if line and column and isinstance(source, str):
        for shown in excerpt(source, line, column):
            _errors.print(f"  {shown}", markup=False, highlight=False, soft_wrap=True, emoji=False)
    raise typer.Exit(1)


def _at(raw: Any, path: str) -> Any:
    """The member of parsed JSON at ``path`` (``rules[0].if``), or None."""
    for key, index in re.findall(r"([^.\[\]]+)|\[(\d+)\]", path):
        try:
            raw = raw[key] if key else raw[int(index)]
        except (KeyError, IndexError, TypeError):
            return None
    return raw


def excerpt(source: str, line: int, column: int) -> list[str]:
    """The line, cut to what fits around the column, and a caret under it."""
    lines = source.split("\n")
    if line > len(lines):
        return []
    words = "".join(letter if letter.isprintable() else " " for letter in lines[line - 1])
    first = max(0, column - 1 - _WIDTH * 2 // 3)
    cut = words[first : first + _WIDTH].rstrip()
    before = "…" * (first > 0)
    after = "…" * (len(words.rstrip()) > first + _WIDTH)
    return [before + cut + after, " " * cell_len(before + words[first : column - 1]) + "^"]


def summary(ruleset: Ruleset) -> list[str]:
    """What a rule set amounts to, as lines."""
    saes = sorted({sae for sae, _ in ruleset.reads()})
    sizes = [
        (len(ruleset.propositions), "proposition"),
        (len(ruleset.rules), "rule"),
        (len({rule.head for rule in ruleset.rules}), "conclusion"),
        (len(ruleset.actions), "action"),
    ]
    lines = [", ".join(f"{count} {what}{'s' * (count != 1)}" for count, what in sizes)]
    if saes:
        lines.append(f"reads      {len(ruleset.reads())} features of {', '.join(saes)}")
    if ruleset.strata:
        lines.append(f"decided    {' · then '.join(', '.join(names) for names in ruleset.strata)}")
    if ruleset.closed:
        lines.append(f"at the end of the prompt: {', '.join(sorted(ruleset.closed))}")
    if ruleset.latching:
        lines.append(f"for good   {', '.join(sorted(ruleset.latching))}")
    return [*lines, f"digest     {ruleset.digest}"]
