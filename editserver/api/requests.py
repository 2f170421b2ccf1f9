"""vLLM's request models with our two fields, so that the published schema is the true one."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

from pydantic import PlainValidator, PrivateAttr

from editserver.api.edit import Edit
from editserver.api.vllm_entry import ChatCompletionRequest, CompletionRequest
from interventions.spec import Inspect, InterventionSpec


def _as_given(value: Any) -> Any:
    """The fields are read by ``interventions.spec``, whose errors name the exact path; here they only get their schema."""
    return value


Interventions = Annotated[Any, PlainValidator(_as_given, json_schema_input_type=list[InterventionSpec] | None)]
Inspection = Annotated[Any, PlainValidator(_as_given, json_schema_input_type=Inspect | list[Inspect] | None)]


class EditChatRequest(ChatCompletionRequest):
    """OpenAI's chat request (as vLLM understands it) plus ``interventions`` and ``inspect``."""

    # vLLM caches the names of the known fields on the class; the parent's would not have ours.
    field_names: ClassVar[set[str] | None] = None

    interventions: Interventions = None
    inspect: Inspection = None
    _edit: Edit | None = PrivateAttr(None)

    def to_sampling_params(self, *args: Any, **kwargs: Any) -> Any:
        """vLLM's sampling parameters, carrying the compiled program."""
        params = super().to_sampling_params(*args, **kwargs)
        if self._edit is not None:
            self._edit.admit(params)
        return params


class EditCompletionRequest(CompletionRequest):
    """OpenAI's completion request (as vLLM understands it) plus ``interventions`` and ``inspect``."""

    # vLLM caches the names of the known fields on the class; the parent's would not have ours.
    field_names: ClassVar[set[str] | None] = None

    interventions: Interventions = None
    inspect: Inspection = None
    _edit: Edit | None = PrivateAttr(None)

    def to_sampling_params(self, *args: Any, **kwargs: Any) -> Any:
        """vLLM's sampling parameters, carrying the compiled program."""
        params = super().to_sampling_params(*args, **kwargs)
        if self._edit is not None:
            self._edit.admit(params)
        return params


def edit_of(request: Any) -> Edit | None:
    """The edit that a request carries, or None for plain traffic."""
    return getattr(request, "_edit", None)
