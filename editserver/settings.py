"""What an operator can set for the API side of one server. The engine's side is ``editserver.engine.config``."""

from __future__ import annotations

import math
from argparse import Namespace
from dataclasses import dataclass, field
from pathlib import Path

from editserver.demo.model import cache_root
from interventions.limits import Limits

MAX_BODY_BYTES = 32 * 2**20
"""Largest request body unless the operator says otherwise."""

ATTRIBUTE = "editserver"
"""Name under which the settings travel on vLLM's parsed arguments, from the command line to the endpoint plugin."""


class SettingsError(ValueError):
    """An option of the command line that cannot be; the message names the option."""


@dataclass(frozen=True)
class DoseBound:
    """``--max-dose X[:clamp|refuse]``: bound of ||delta|| / ||h|| per token and layer, and what happens above it."""

    maximum: float = math.inf
    refuse: bool = False

    @classmethod
    def parse(cls, text: str) -> DoseBound:
        """Read the option's value.

        Raises:
            SettingsError: not a number above 0, or an unknown mode.
        """
        number, _, mode = text.partition(":")
        if mode not in ("", "clamp", "refuse"):
            raise SettingsError(f"--max-dose {text}: {mode!r} is neither clamp nor refuse")
        try:
            maximum = float(number)
        except ValueError:
            raise SettingsError(f"--max-dose {text}: {number!r} is not a number") from None
        if not maximum > 0:
            raise SettingsError(f"--max-dose {text}: the bound must be above 0 (working points are near 0.5 to 0.8)")
        return cls(maximum, mode == "refuse")


@dataclass(frozen=True)
class Settings:
    """API-side configuration of one server.

    Attributes:
        limits: bounds per request, published in ``/v1/capabilities``.
        dose: the operator's dose bound.
        library: folder of the library's artefacts.
        max_body_bytes: larger request bodies are answered with 413.
    """

    limits: Limits = field(default_factory=Limits)
    dose: DoseBound = field(default_factory=DoseBound)
    library: Path = field(default_factory=lambda: cache_root() / "library")
    max_body_bytes: int = MAX_BODY_BYTES

    @classmethod
    def of(cls, args: Namespace) -> Settings:
        """The settings that the command line attached to vLLM's arguments; defaults when there are none."""
        settings = getattr(args, ATTRIBUTE, None)
        return settings if isinstance(settings, cls) else cls()
