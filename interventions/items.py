"""What all request objects share: strict JSON objects, and how a validation error becomes a message with its place."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, ValidationError, model_validator

from interventions.fields import ALL_TOKENS, Flag, Label, Path, Tokens, fault
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
        present = {key: value for key, value in data.items() if value is not None}
        for key in present:
            if not isinstance(key, str) or key not in cls.model_fields:
                name = key if isinstance(key, str) else show(key)
                known = choices(cls.model_fields)
                raise fault(f"unknown field; known are {known}.{nearest(name, cls.model_fields)}", printable(name))
        return present

    def given(self, name: str) -> bool:
        """Whether the request set the field (to anything but null)."""
        return name in self.model_fields_set


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
