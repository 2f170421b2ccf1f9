"""Which tokens of a request an intervention or a reading concerns.

Positions are absolute after the chat template (`Client.tokenize` shows them). Position 0 is left out of every selector
unless `include_bos` is set: it is the attention sink.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Final, Literal

from pydantic import AliasChoices, Field, StrictInt, StrictStr
from pydantic.dataclasses import dataclass

from .wire import STRICT, Wire

Phase = Literal["all", "prompt", "generated", "last_prompt_token"]


@dataclass(frozen=True, config=STRICT)
class Slice(Wire):
    """Positions start ≤ p < stop over the whole request; negatives count from the end of the prompt.

    Without `stop` the slice includes generated tokens.
    """

    start: Annotated[int, Field(serialization_alias="from", validation_alias=AliasChoices("from", "start"))]
    stop: Annotated[int | None, Field(serialization_alias="to", validation_alias=AliasChoices("to", "stop"))] = None


@dataclass(frozen=True, config=STRICT)
class TokenSet(Wire):
    """Every position that holds one of these tokens: ids, or strings that encode to exactly one token."""

    tokens: Annotated[Sequence[StrictInt | StrictStr], Field(min_length=1)]


OneSelector = Phase | Slice | TokenSet
Selector = OneSelector | Annotated[Sequence[OneSelector], Field(min_length=1)]
"""One selector, or a list of them: their union."""


class Tokens:
    """Names for the selectors: ``tokens=[Tokens.last_prompt_token, Tokens.generated]``."""

    all: Final[Literal["all"]] = "all"
    prompt: Final[Literal["prompt"]] = "prompt"
    generated: Final[Literal["generated"]] = "generated"
    last_prompt_token: Final[Literal["last_prompt_token"]] = "last_prompt_token"

    @staticmethod
    def slice(start: int, stop: int | None = None) -> Slice:
        """Positions start ≤ p < stop."""
        return Slice(start, stop)

    @staticmethod
    def ids(tokens: Sequence[int | str]) -> TokenSet:
        """Positions that hold one of these tokens (ids or one-token strings)."""
        return TokenSet(tokens)
