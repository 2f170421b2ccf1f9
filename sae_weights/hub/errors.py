"""The Hub client's errors in terms of what was asked for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from sae_weights.errors import SAEFormatError

from .place import HubPath


@contextmanager
def explained(where: HubPath, *, connection: bool = False) -> Iterator[None]:
    """SAEFormatError for whatever the client raises; no connection is a ConnectionError unless ``connection`` is needed."""
    try:
        yield
    except SAEFormatError:
        raise
    except Exception as error:  # the client raises its own errors, those of two HTTP libraries, and the disk's
        reason = _reason(where, error)
        if isinstance(reason, ConnectionError) and connection:
            raise SAEFormatError(f"{where}: the Hub cannot be reached ({reason})") from None
        if reason is None:
            raise
        raise reason from None


def _reason(where: HubPath, error: Exception) -> Exception | None:
    from huggingface_hub import errors

    told = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
    if isinstance(error, errors.GatedRepoError):
        terms = f"{where.repo} asks for its terms to be accepted: do so on its page, then `hf auth login`"
        return SAEFormatError(f"{where}: {terms}")
    if isinstance(error, errors.RepositoryNotFoundError):
        return SAEFormatError(
            f"{where}: no repository {where.repo} that you may read (for a private one: `hf auth login`)"
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return SAEFormatError(f"{where}: {where.repo} has no branch, tag or commit {where.revision!r}")
    if isinstance(error, (errors.OfflineModeIsEnabled, errors.LocalEntryNotFoundError, *_transport_errors())):
        return ConnectionError(told)
    if isinstance(error, errors.EntryNotFoundError):
        return SAEFormatError(f"{where}: {where.repo} has no such file")
    if isinstance(error, errors.HfHubHTTPError):
        return SAEFormatError(f"{where}: the Hub refuses: {told}")
    if isinstance(error, OSError):
        return SAEFormatError(f"{where}: cannot be stored: {told}")
    return None


def _transport_errors() -> tuple[type[BaseException], ...]:
    """No connection, as the HTTP library below the client (httpx2, before it httpx) raises it."""
    found: list[type[BaseException]] = []
    for name in ("httpx2", "httpx"):
        try:
            found.append(__import__(name).TransportError)
        except ImportError:
            continue
    return tuple(found)
