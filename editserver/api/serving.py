"""vLLM's chat and completion handlers, with edits.

The running handler's ``__class__`` is exchanged, so its twenty constructor arguments (which change between releases) are
never listed here. Requests without our fields take vLLM's path unchanged. The others differ in four places: the fields are
compiled before anything else, the rendered prompts are kept, the engine's outputs are watched, and receipts and readings
are added to what goes back.
"""

from __future__ import annotations

import json
from typing import Any

from editserver import metrics
from editserver.api.edit import Edit
from editserver.api.errors import envelope
from editserver.api.guard import FIELDS, RELEASES, is_present
from editserver.api.requests import EditChatRequest, EditCompletionRequest, edit_of
from editserver.api.state import EditState
from editserver.api.stream import EditStream
from editserver.api.vllm_entry import (
    ChatCompletionResponse,
    ErrorResponse,
    OpenAIServingChat,
    OpenAIServingCompletion,
)
from interventions.errors import InterventionError


class _Edited:
    """What both handlers share."""

    editserver: EditState
    engine_client: Any

    def _prepare(self, request: Any, raw_request: Any) -> None:
        """Compile our fields, if there are any, into ``request._edit``."""
        if not isinstance(request, (EditChatRequest, EditCompletionRequest)):
            extra = getattr(request, "model_extra", None) or {}
            for name in FIELDS:
                if is_present(extra.get(name)):
                    message = f"{name} is not supported on this route"
                    raise InterventionError("unsupported_with_interventions", message, name)
            return
        if not (is_present(request.interventions) or is_present(request.inspect)):
            return
        if request.use_beam_search:
            message = "beam search cannot be combined with interventions or inspect"
            raise InterventionError("unsupported_with_interventions", message, "use_beam_search")
        releases = raw_request.scope[RELEASES]
        request._edit = Edit.prepare(self.editserver, request.interventions, request.inspect, releases)

    def create_streaming_error_response(self, message: Any, *args: Any, **kwargs: Any) -> str:
        """The data of an SSE error; our errors keep their code and param."""
        if isinstance(message, InterventionError):
            metrics.REFUSALS.labels(message.code).inc()
            return json.dumps(envelope(message))
        text: str = super().create_streaming_error_response(message, *args, **kwargs)  # type: ignore[misc]
        return text


class EditServingChat(_Edited, OpenAIServingChat):
    """Chat completions."""

    async def create_chat_completion(self, request: Any, raw_request: Any = None, *args: Any, **kwargs: Any) -> Any:
        """As vLLM's; raises :class:`InterventionError` before anything runs."""
        self._prepare(request, raw_request)
        return await super().create_chat_completion(request, raw_request, *args, **kwargs)

    async def render_chat_request(self, request: Any, *args: Any, **kwargs: Any) -> Any:
        """As vLLM's; keeps the prompt's token ids."""
        result = await super().render_chat_request(request, *args, **kwargs)
        edit = edit_of(request)
        if edit is not None and not isinstance(result, ErrorResponse):
            edit.set_prompts([self._extract_prompt_components(prompt).token_ids for prompt in result[1]])
        return result

    def chat_completion_stream_generator(
        self, request: Any, result_generator: Any, request_id: str, model_name: str, *args: Any, **kwargs: Any
    ) -> Any:
        """As vLLM's, with chunks of ours in between."""
        upstream = super().chat_completion_stream_generator
        edit = edit_of(request)
        if edit is None:
            return upstream(request, result_generator, request_id, model_name, *args, **kwargs)
        stream = EditStream(edit, request_id, model_name, "chat.completion.chunk")
        watched = edit.watch(result_generator, request.n or 1, True, stream.tell)
        return stream.run(upstream(request, stream.until_end(watched), request_id, model_name, *args, **kwargs))

    async def chat_completion_full_generator(
        self, request: Any, result_generator: Any, *args: Any, **kwargs: Any
    ) -> Any:
        """As vLLM's, with receipts and readings in the answer."""
        edit = edit_of(request)
        if edit is None:
            return await super().chat_completion_full_generator(request, result_generator, *args, **kwargs)
        watched = edit.watch(result_generator, request.n or 1, False)
        response = await super().chat_completion_full_generator(request, watched, *args, **kwargs)
        if isinstance(response, ChatCompletionResponse):
            edit.attach(response)
        return response


class EditServingCompletion(_Edited, OpenAIServingCompletion):
    """Text completions."""

    async def create_completion(self, request: Any, raw_request: Any = None, *args: Any, **kwargs: Any) -> Any:
        """As vLLM's; raises :class:`InterventionError` before anything runs."""
        self._prepare(request, raw_request)
        return await super().create_completion(request, raw_request, *args, **kwargs)

    async def render_completion_request(self, request: Any, *args: Any, **kwargs: Any) -> Any:
        """As vLLM's; keeps the prompts' token ids."""
        result = await super().render_completion_request(request, *args, **kwargs)
        edit = edit_of(request)
        if edit is not None and not isinstance(result, ErrorResponse):
            edit.set_prompts([self._extract_prompt_components(prompt).token_ids for prompt in result])
        return result

    def completion_stream_generator(
        self,
        request: Any,
        engine_inputs: Any,
        result_generator: Any,
        request_id: str,
        created_time: int,
        model_name: str,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """As vLLM's, with chunks of ours in between."""
        upstream = super().completion_stream_generator
        edit = edit_of(request)
        if edit is None:
            results = result_generator
            return upstream(request, engine_inputs, results, request_id, created_time, model_name, *args, **kwargs)
        stream = EditStream(edit, request_id, model_name, "text_completion", created_time)
        watched = stream.until_end(edit.watch(result_generator, request.n or 1, True, stream.tell))
        return stream.run(
            upstream(request, engine_inputs, watched, request_id, created_time, model_name, *args, **kwargs)
        )

    def request_output_to_completion_response(
        self, final_res_batch: Any, request: Any, *args: Any, **kwargs: Any
    ) -> Any:
        """As vLLM's, with receipts and readings in the answer."""
        edit = edit_of(request)
        if edit is not None:
            for prompt_index, result in enumerate(final_res_batch):
                edit.observe(prompt_index, result, request.n or 1, False)
        response = super().request_output_to_completion_response(final_res_batch, request, *args, **kwargs)
        if edit is not None:
            edit.attach(response)
        return response
