"""What commands that talk to a running server share: the connection, its failures, and texts from files."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.status import Status

if TYPE_CHECKING:
    from editserver_client import Client

DEFAULT_URL = "http://localhost:8000"

Url = Annotated[str, typer.Option("--url", metavar="URL", help="The running server.")]
MaybeUrl = Annotated[
    str | None, typer.Option("--url", metavar="URL", help="Ask this server instead of the bundled files.")
]
ApiKey = Annotated[
    str | None, typer.Option("--api-key", metavar="KEY", envvar="EDITSERVER_API_KEY", help="The server's API key.")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for machines.")]

_errors = Console(stderr=True)


def fail(message: str) -> NoReturn:
    """Say what is wrong, on stderr, and exit with 2."""
    _errors.print(f"editserver: {message}", style="red", markup=False, highlight=False, soft_wrap=True)
    raise typer.Exit(2)


@contextmanager
def connected(url: str, api_key: str | None) -> Iterator[Client]:
    """A client of the server at ``url``; its refusals end the command with their message."""
    from editserver_client import APIConnectionError, Client, EditserverError

    try:
        with Client(url, api_key=api_key) as client:
            yield client
    except APIConnectionError as error:
        fail(f"{error}; is the server running? Start one with: editserver serve demo")
    except (EditserverError, ValueError) as error:
        fail(str(error))


def working(message: str) -> Status:
    """A context manager: a spinner on stderr while the server works."""
    return _errors.status(message)


def print_json(value: Any) -> None:
    """To stdout, as it is: no colours, no wrapping."""
    typer.echo(json.dumps(value, ensure_ascii=False, indent=2))


def read_texts(given: Sequence[str], option: str) -> list[Any]:
    """Texts of ``option``: each value is a text, or a file with one text per line.

    Lines of a ``.jsonl`` file are JSON: a string, ``{"text": …}``, ``{"messages": […]}``, or a list of messages.
    Ends the command if there is no text, or a file that cannot be read.
    """
    texts: list[Any] = []
    for value in given:
        path = Path(value)
        if not _is_file(path):
            texts.append(value)
            continue
        try:
            lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        except (OSError, UnicodeDecodeError) as error:
            fail(f"{option} {value}: {error}")
        texts += [_json_text(line, i, path, option) for i, line in enumerate(lines, 1)] if _is_jsonl(path) else lines
    if not texts:
        fail(f"{option}: no text; give texts, or files with one text per line")
    return texts


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # a text too long for a file's name, or with a NUL in it
        return False


def _is_jsonl(path: Path) -> bool:
    return path.suffix in (".jsonl", ".json")


def _json_text(line: str, number: int, path: Path, option: str) -> Any:
    try:
        value = json.loads(line)
    except ValueError as error:
        fail(f"{option} {path}, line {number}: not JSON ({error})")
    if isinstance(value, dict):
        value = value.get("text", value.get("messages"))
    if not isinstance(value, (str, list)):
        fail(f'{option} {path}, line {number}: expected a string, {{"text": …}} or {{"messages": […]}}')
    return value
