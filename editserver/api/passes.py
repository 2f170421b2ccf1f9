"""Forward passes of the served engine for our own endpoints: prompts in; edits, readings and distributions out.

A pass runs exactly what a request with the same fields would run (compiled, admitted, watched), generates one token that
is never fed, and reads no prefix cache, so that its numbers cover every prompt position.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
from pydantic import PlainValidator, ValidationError
from vllm import SamplingParams
from vllm.sampling_params import RequestOutputKind

from editserver.api.edit import Choice, Edit, failed
from editserver.api.errors import as_code
from editserver.api.requests import EditChatRequest, EditCompletionRequest
from editserver.api.state import EditState
from editserver.api.vllm_entry import ErrorResponse
from interventions.compiled import Compiled
from interventions.errors import Code, InterventionError
from interventions.program import STREAM, Read
from interventions.selectors import ALL
from interventions.spec import parse_inspect, parse_interventions
from interventions.wording import printable, show

MAX_CONTRAST_TEXTS = 128
"""Texts of one side of a contrast."""
MAX_CALIBRATION_PROMPTS = 32
"""Prompts of one calibration, each run up to 20 times."""
MAX_FIT_TEXTS = 4096
"""Texts of one fit, all classes together."""
MAX_FIT_TOKENS = 131_072
"""Tokens of one fit: their activations are kept until it is done."""
MAX_FIT_CLASSES = 32
"""Classes of one fit, the background among them."""


def as_text(value: Any) -> Any:
    """``value`` itself if it is a text or a chat, else ``ValueError``."""
    if isinstance(value, str):
        return value
    if isinstance(value, list) and value and all(isinstance(message, dict) for message in value):
        return value
    raise ValueError(f"expected a text, or a chat as a list of messages; got {show(value)}")


Text = Annotated[str | list[dict[str, Any]], PlainValidator(as_text, json_schema_input_type=str | list[dict[str, Any]])]
"""A text, taken as it is, or OpenAI's messages, which the model's chat template turns into one."""


@dataclass(frozen=True)
class Prompt:
    """A rendered text: what the engine takes, its token ids, and where it stands in the request."""

    engine_input: Any
    token_ids: Sequence[int]
    param: str


def shortened(prompt: Prompt, n_tokens: int) -> Prompt:
    """Its first ``n_tokens`` tokens; a prompt that is more than tokens (one with an image) stays as it is."""
    if len(prompt.token_ids) <= n_tokens or prompt.engine_input.get("type") != "token":
        return prompt
    ids = list(prompt.token_ids[:n_tokens])
    engine_input = {key: value for key, value in prompt.engine_input.items() if key != "prompt"}
    return Prompt(engine_input | {"prompt_token_ids": ids}, ids, prompt.param)


@dataclass(frozen=True)
class Passes:
    """What one round of passes brought, by prompt.

    Attributes:
        edit: the compiled fields.
        choices: what the engine reported.
        logprobs: log-probabilities of the next token, float64 ``[vocab]``; empty unless asked for.
        prompt_logprobs: log-probability of each prompt token but the first, float64 ``[tokens − 1]``; empty unless asked for.
    """

    edit: Edit
    choices: list[Choice]
    logprobs: list[npt.NDArray[np.float64]]
    prompt_logprobs: list[npt.NDArray[np.float64]]


class _WholeVocabulary(SamplingParams):
    """Log-probabilities of all tokens, whatever ``--max-logprobs`` allows the public: they stay inside the server.

    The engine computes them for any request (``logprobs`` = -1); only this check stands before it
    (vllm/sampling_params.py:919). Were it renamed, the request would be refused, not answered with fewer.
    """

    def _validate_logprobs(self, model_config: Any) -> None:
        pass


async def render(state: EditState, texts: Sequence[Any], field: str, code: Code) -> list[Prompt]:
    """Tokenise ``texts`` as the OpenAI endpoints do.

    Raises:
        InterventionError: ``code``, for a text that cannot be a prompt (empty, too long, no messages).
    """
    return [await _render(state, text, f"{field}[{i}]", code) for i, text in enumerate(texts)]


async def _render(state: EditState, text: Any, param: str, code: Code) -> Prompt:
    chat, completion = state.app_state.openai_serving_chat, state.app_state.openai_serving_completion
    handler = completion if isinstance(text, str) else chat
    try:
        if handler is completion:
            result = await completion.render_completion_request(EditCompletionRequest(prompt=text, max_tokens=1))
        else:
            result = await chat.render_chat_request(EditChatRequest(messages=text, max_completion_tokens=1))
    except ValidationError as error:
        message = error.errors(include_url=False, include_input=False)[0]["msg"]
        raise InterventionError(code, printable(f"{param}: {message}"), param) from None
    except Exception as error:
        result = handler.create_error_response(error)
        if result.error.code >= 500:
            raise
    if isinstance(result, ErrorResponse):
        raise InterventionError(code, printable(f"{param}: {result.error.message}"), param)
    (engine_input,) = result if handler is completion else result[1]
    token_ids = handler._extract_prompt_components(engine_input).token_ids
    return Prompt(engine_input, token_ids, param)


async def run(
    state: EditState,
    prompts: Sequence[Prompt],
    interventions: Any = None,
    inspect: Any = None,
    logprobs: bool = False,
    *,
    prompt_logprobs: bool = False,
    stream: int | None = None,
    priority: int = 0,
) -> Passes:
    """One pass over each prompt, all at once.

    Args:
        interventions, inspect: the fields of a request, as parsed JSON.
        logprobs: whether the next-token distributions are wanted.
        prompt_logprobs: whether those of the prompt's own tokens are; not on a server for which :func:`tells_logprobs` is false.
        stream: a layer whose residual stream at the prompt's tokens is read too, after the inspections.
        priority: of the passes, under ``--scheduling-policy priority``: smaller numbers go first, requests have 0.

    Raises:
        InterventionError: with the contract's codes; ``param`` is a path below ``interventions`` or ``inspect``.
    """
    specs, reads = parse_interventions(interventions), parse_inspect(inspect)
    compiled = state.compile(specs, reads)
    if stream is not None:
        compiled = with_stream(state, compiled, stream)
    edit = Edit(state, compiled, isinstance(inspect, list))
    edit.set_prompts([prompt.token_ids for prompt in prompts])
    release = state.capacity.reserve(edit.compiled.row_keys)
    try:
        params = [_admitted(edit, prompt, logprobs, prompt_logprobs) for prompt in prompts]
        async with asyncio.TaskGroup() as group:
            tasks = [
                group.create_task(_pass(state, edit, i, prompt, one, priority))
                for i, (prompt, one) in enumerate(zip(prompts, params, strict=True))
            ]
    except BaseExceptionGroup as errors:
        raise errors.exceptions[0] from None
    finally:
        release()
    vocab = state.catalogue.vocab_size
    distributions = [_distribution(task.result(), vocab) for task in tasks] if logprobs else []
    own = (
        [_of_prompt(task.result(), prompt) for task, prompt in zip(tasks, prompts, strict=True)]
        if prompt_logprobs
        else []
    )
    return Passes(edit, [edit.choices[i] for i in range(len(prompts))], distributions, own)


def with_stream(state: EditState, compiled: Compiled, layer: int) -> Compiled:
    """``compiled``, the residual stream at ``layer`` read too; raises InterventionError where the engine does not do that."""
    # A pass feeds nothing but the prompt.
    read = Read(STREAM, layer, tuple(range(state.catalogue.d_model)), 0, ALL)
    streaming = replace(
        compiled,
        reads=(*compiled.reads, read),
        inspect_ids=(*compiled.inspect_ids, STREAM),
        inspect_params=(*compiled.inspect_params, STREAM),
        inspect_approximate=(*compiled.inspect_approximate, False),
        inspects_prompt=True,
    )
    state.check(streaming)
    return streaming


def tells_logprobs(state: EditState) -> bool:
    """Whether log-probabilities are what the engine reports: under ``--logprobs-mode raw_logits`` they are not."""
    engine = state.app_state.openai_serving_completion.engine_client
    return str(engine.vllm_config.model_config.logprobs_mode).endswith("logprobs")


def _admitted(edit: Edit, prompt: Prompt, logprobs: bool, prompt_logprobs: bool) -> SamplingParams:
    common: dict[str, Any] = {
        "max_tokens": 1,
        "temperature": 0.0,
        "detokenize": False,
        "skip_reading_prefix_cache": True,
    }
    if prompt_logprobs:
        common |= {"prompt_logprobs": 0, "flat_logprobs": True}
    kind = RequestOutputKind.FINAL_ONLY
    if logprobs:
        params = _WholeVocabulary(**(common | {"logprobs": -1, "flat_logprobs": True}), output_kind=kind)
    else:
        params = SamplingParams(**common, output_kind=kind)
    try:
        edit.admit(params)
    except InterventionError as error:
        message = error.message.replace(", and with this max_tokens no generated token is fed back", "")
        raise InterventionError(as_code(error.code), f"{message} ({prompt.param})", error.param) from None
    return params


async def _pass(state: EditState, edit: Edit, index: int, prompt: Prompt, params: SamplingParams, priority: int) -> Any:
    engine = state.app_state.openai_serving_completion.engine_client
    request_id = f"editserver-{uuid.uuid4().hex}"
    last = None
    async with aclosing(engine.generate({**prompt.engine_input}, params, request_id, priority=priority)) as results:
        async for last in results:
            edit.observe(index, last, 1, False)
    if last is None:
        raise failed("the engine ended without an output")
    return last


def _distribution(result: Any, vocab: int) -> npt.NDArray[np.float64]:
    """The next token's log-probabilities; tokens that the model has no logit for (padding) have −∞."""
    flat = result.outputs[0].logprobs
    here = slice(flat.start_indices[0], flat.end_indices[0])
    dense = np.full(vocab, -np.inf)
    dense[np.asarray(flat.token_ids[here])] = flat.logprobs[here]
    largest = dense.max()
    # Under --logprobs-mode raw_logits they are logits; normalising log-probabilities changes nothing.
    normalised: npt.NDArray[np.float64] = dense - (largest + np.log(np.exp(dense - largest).sum()))
    return normalised


def _of_prompt(result: Any, prompt: Prompt) -> npt.NDArray[np.float64]:
    """Log-probability of each prompt token but the first, given those before it."""
    flat = result.prompt_logprobs
    # Position 0 has no entry; every other one has exactly that of the token that stands there.
    if flat is None or list(flat.token_ids) != [int(token) for token in prompt.token_ids[1:]]:
        raise failed("the engine ended without the log-probabilities of the prompt")
    return np.array(flat.logprobs, np.float64)
