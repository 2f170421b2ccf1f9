"""JSON bodies of our own endpoints: parsed by hand, so that every error has the contract's code and param."""

from __future__ import annotations

import json
from typing import Any, TypeVar, get_args, get_origin

from fastapi import Request
from pydantic import BaseModel, ValidationError

from interventions.errors import Code, InterventionError
from interventions.spec import join
from interventions.wording import printable

ModelT = TypeVar("ModelT", bound=BaseModel)


async def read_json(request: Request, code: Code) -> Any:
    """The body as JSON; raises ``code`` if it is not."""
    try:
        return json.loads(await request.body())
    except (ValueError, RecursionError):
        raise InterventionError(code, "the body is not JSON") from None


def validate(model: type[ModelT], raw: Any, code: Code) -> ModelT:
    """``raw`` as ``model``; the first error becomes ``code`` with the path of its field."""
    try:
        return model.model_validate(raw)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        # Branches of a union appear in the path by their type's name; they are no fields.
        places = [
            p
            for i, p in enumerate(first["loc"])
            if isinstance(p, int)
            or p in model.model_fields
            or first["type"] == "extra_forbidden"
            or (i == 1 and _is_mapping(model, first["loc"][0]))
        ]
        param = join(str(places[0]), *places[1:]) if places else None
        message = first["msg"].removeprefix("Value error, ")
        raise InterventionError(code, printable(f"{param}: {message}" if param else message), param) from None


def _is_mapping(model: type[BaseModel], name: Any) -> bool:
    """Whether field ``name`` is a dictionary, whose keys belong to the path."""
    field = model.model_fields.get(name)
    return field is not None and dict in (get_origin(kind) for kind in (field.annotation, *get_args(field.annotation)))
