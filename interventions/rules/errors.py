"""What is wrong with a rule set, and where: line and column of the text form, or the path in the JSON form."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

from interventions.errors import Code, InterventionError
from interventions.wording import printable


@dataclass(frozen=True)
class Place:
    """Where something was written: ``line`` and ``column`` (from 1) of a text, below the field ``path`` of a JSON form."""

    line: int = 0
    column: int = 0
    path: str = ""

    def __str__(self) -> str:
        spot = f"line {self.line}, column {self.column}" if self.line else ""
        return ", ".join(part for part in (self.path, spot) if part)

    def below(self, *keys: str | int) -> Place:
        """The place of a member of the JSON value at this place."""
        path = self.path
        for key in keys:
            path += f"[{key}]" if isinstance(key, int) else f".{printable(key[:64])}"
        return Place(self.line, self.column, path.removeprefix("."))


NOWHERE = Place()


class RuleError(InterventionError):
    """A rule set, rule or ``when`` expression that is refused; ``place`` says where.

    ``code`` is ``rule_syntax`` for everything but an order of layers (``rule_layer_order``), a name that the server
    does not have (``unknown_…``) and a size (``limit_exceeded``).
    """

    def __init__(self, message: str, place: Place = NOWHERE, code: Code = "rule_syntax") -> None:
        where = str(place)
        super().__init__(code, printable(f"{where}: {message}" if where else message), place.path or None)
        self.detail = message
        self.place = place
        self.line = place.line or None
        self.column = place.column or None

    def under(self, path: str) -> RuleError:
        """The same error in a text that is the field ``path``; an error that has a path keeps it."""
        if not path or self.place.path:
            return self
        place = Place(self.place.line, self.place.column, path)
        return RuleError(self.detail, place, cast(Code, self.code))
