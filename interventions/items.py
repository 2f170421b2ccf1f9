"""What all request objects share: strict JSON objects, and how a validation error becomes a message with its place."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PlainValidator,
    PrivateAttr,
    ValidationError,
    WithJsonSchema,
    model_validator,
)

from interventions.fields import ALL_TOKENS, Flag, Label, Path, Tokens, fault, text
from interventions.wording import choices, nearest, printable, show


class Item(BaseModel):
    """A JSON object of ours: unknown fields are errors, ``null`` means absent."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _known_fields(cls, data: Any) -> Any:
        if isinstance(data, cls):
            return data
        if not isinstance(data, dict):
            raise fault(f"expected an object, got {show(data)}")
        present, known = {key: value for key, value in data.items() if value is not None}, cls.__pydantic_fields__
        if not present.keys() <= known.keys():
            key = next(key for key in present if key not in known)
            name = key if isinstance(key, str) else show(key)
            raise fault(f"unknown field; known are {choices(known)}.{nearest(name, known)}", printable(name))
        return present

    def given(self, name: str) -> bool:
        """Whether the request set the field (to anything but null)."""
        return name in self.model_fields_set


MAX_EXPRESSION = 2**16
"""Longest ``when`` in the text form, in characters."""


def _expression(value: Any) -> Any:
    if isinstance(value, str):
        return text(value, at_most=MAX_EXPRESSION)
    if not isinstance(value, dict):
        raise fault(f"expected a rule expression, as text or as an object; got {show(value)}")
    return value


Expression = Annotated[
    Any,
    PlainValidator(_expression),
    WithJsonSchema({"anyOf": [{"type": "string", "minLength": 1, "maxLength": MAX_EXPRESSION}, {"type": "object"}]}),
]
"""A rule expression, unread: text, or the JSON form."""


class Common(Item):
    """Fields of every intervention."""

    _param: str = PrivateAttr("interventions[0]")

    id: Label = Field("", description="Label that the receipt repeats; default: the index in the list, as a string.")
    tokens: Tokens = Field(
        default_factory=lambda: ALL_TOKENS,
        description="Which tokens: all, prompt, generated, last_prompt_token, a slice, token ids or strings, or a list "
        "(their union).",
    )
    include_bos: Flag = Field(False, description="Whether position 0 may be selected too.")
    when: Expression | None = Field(
        None, description="A rule expression: the intervention acts only at tokens where it holds."
    )

    @property
    def param(self) -> str:
        """Path of the intervention in the request, ``interventions[2]``."""
        return self._param


_ADVICE = {"missing": "is required"}


def first_fault(error: ValidationError) -> tuple[str, Path]:
    """Message and path of the first thing that is wrong."""
    first = error.errors(include_url=False, include_input=False)[0]
    path: Path = (*first["loc"], *first.get("ctx", {}).get("path", ()))
    return _ADVICE.get(first["type"], first["msg"]), path


def join(param: str, *path: str | int) -> str:
    """``join("interventions", 2, "features", 0, "index")`` is ``interventions[2].features[0].index``."""
    return param + "".join(f"[{part}]" if isinstance(part, int) else f".{part[:64]}" for part in path)
