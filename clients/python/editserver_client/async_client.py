"""The asynchronous client: `Client` with await."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, Literal, Self

import httpx

from . import calls
from .base import DEFAULT_BASE_URL, DEFAULT_TIMEOUT, BaseClient
from .body import InspectLike, Interventions, LabelledTexts, Messages, Prompt, Texts, chat_messages, generation
from .calls import Call, Kind, T
from .catalogue import (
    Activations,
    Artifact,
    Capabilities,
    Contrast,
    FeatureCard,
    FeatureInfo,
    SAEInfo,
    StrengthCalibration,
    Tokenization,
)
from .exceptions import APIConnectionError, ServerError
from .handles import AsyncJob, AsyncJobs
from .interventions import Intervention
from .jobs import ConceptFit
from .responses import ChatResponse, CompletionResponse
from .rules import NormalForm, RulesetLike
from .streams import AsyncChatStream, AsyncCompletionStream, AsyncStream
from .wire import Wire


class AsyncClient(BaseClient):
    __doc__ = BaseClient.__doc__

    def __init__(
        self,
        base_url: str = DEFAULT_BASE_URL,
        *,
        api_key: str | None = None,
        timeout: float | httpx.Timeout | None = DEFAULT_TIMEOUT,
        retries: int = 2,
        max_retry_wait: float = 60.0,
        headers: Mapping[str, str] | None = None,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        super().__init__(base_url, api_key, timeout, retries, max_retry_wait, headers)
        self._http = httpx.AsyncClient(transport=transport, **self._settings)
        self.library = AsyncLibrary(self)
        self.rulesets = self.library.rulesets
        self.jobs = AsyncJobs(self)

    async def chat(
        self,
        messages: Messages,
        *,
        model: str | None = None,
        interventions: Interventions | None = None,
        inspect: InspectLike | None = None,
        **params: Any,
    ) -> ChatResponse:
        """One chat completion. `params` are OpenAI's and vLLM's own fields (temperature, max_tokens, tools, n …).

        Without `model` the server uses the one it serves.

        Raises:
            BadRequest, RateLimited, InterventionFailed and the others of `exceptions`.
        """
        subject = {"messages": chat_messages(messages)}
        body = generation(subject, model, interventions, inspect, params)
        return await self._send(calls.chat(body))

    def chat_stream(
        self,
        messages: Messages,
        *,
        model: str | None = None,
        interventions: Interventions | None = None,
        inspect: InspectLike | None = None,
        **params: Any,
    ) -> AsyncChatStream:
        """As `chat`, as a stream of events; the request is sent when the stream is entered or first iterated."""
        subject = {"messages": chat_messages(messages)}
        call = calls.chat(generation(subject, model, interventions, inspect, params, stream=True))
        return AsyncStream(ChatResponse, lambda: self._connect(call))

    async def complete(
        self,
        prompt: Prompt,
        *,
        model: str | None = None,
        interventions: Interventions | None = None,
        inspect: InspectLike | None = None,
        **params: Any,
    ) -> CompletionResponse:
        """One text completion; otherwise as `chat`."""
        body = generation({"prompt": prompt}, model, interventions, inspect, params)
        return await self._send(calls.complete(body))

    def complete_stream(
        self,
        prompt: Prompt,
        *,
        model: str | None = None,
        interventions: Interventions | None = None,
        inspect: InspectLike | None = None,
        **params: Any,
    ) -> AsyncCompletionStream:
        """As `complete`, as a stream of events."""
        call = calls.complete(generation({"prompt": prompt}, model, interventions, inspect, params, stream=True))
        return AsyncStream(CompletionResponse, lambda: self._connect(call))

    async def capabilities(self) -> Capabilities:
        """What the server can do: layers, limits, intervention types, schemas."""
        return await self._send(calls.capabilities())

    async def saes(self) -> list[SAEInfo]:
        """The loaded SAEs."""
        return await self._send(calls.saes())

    async def sae(self, id: str) -> SAEInfo:
        """One SAE, for example ``client.sae("smollm2-135m/l15")``."""
        return await self._send(calls.sae(id))

    async def features(self, id: str, q: str | None = None, *, limit: int | None = None) -> list[FeatureInfo]:
        """Features of SAE `id`; `q` searches their labels."""
        return await self._send(calls.features(id, q, limit))

    async def feature(self, id: str, index: int) -> FeatureCard:
        """Everything known about one feature of SAE `id`."""
        return await self._send(calls.feature(id, index))

    async def activations(
        self,
        id: str,
        input: str | Sequence[str] | None = None,
        *,
        messages: Messages | None = None,
        features: Sequence[int] | None = None,
        top_k: int | None = None,
    ) -> list[Activations]:
        """What SAE `id` sees in texts (`input`) or a chat (`messages`), without generating."""
        return await self._send(calls.activations(id, input, messages, features, top_k))

    async def contrast(
        self,
        id: str,
        positive: Texts,
        negative: Texts,
        *,
        limit: int = 10,
        pool: Literal["max", "mean"] | None = None,
        max_density: float | None = None,
    ) -> Contrast:
        """The features of SAE `id` that best separate `positive` from `negative` texts (or chats).

        `pool` is how a text's tokens become one number per feature; features that fire on a larger share of tokens
        than `max_density` are left out.
        """
        return await self._send(calls.contrast(id, positive, negative, limit, pool, max_density))

    async def calibrate_strength(
        self, intervention: Intervention | Mapping[str, Any], prompts: Texts, *, target_kl: float = 0.5
    ) -> StrengthCalibration:
        """The strength at which the mean next-token KL(clean ‖ edited) over `prompts` reaches `target_kl`.

        Calibrated is the strength of a steer, or the value of an edit_features' first set or add op; what is given
        there sets sign and first guess.

        Raises:
            BadRequest: the target cannot be reached; the message names the largest KL that was.
        """
        return await self._send(calls.calibrate_strength(intervention, prompts, target_kl))

    async def fit_concept(
        self,
        name: str,
        *,
        sae: str,
        concepts: Mapping[str, LabelledTexts],
        target: str,
        background: str | Texts | None = None,
        top: int | None = None,
        by: Literal["difference", "mean", "separability"] | None = None,
        max_rate: float | None = None,
        keep_dense: bool = False,
        bins: int | None = None,
        priors: Mapping[str, float] | None = None,
        held_out: float | None = None,
        seed: int | None = None,
        strengths: Sequence[float] | None = None,
        tokens_per_text: int | None = None,
        labels: Literal["sentence", "word", "position"] | None = None,
        words: Sequence[str] | None = None,
        span_tokens: Literal["last", "all"] | None = None,
        detector: Literal["auto", "single", "multi", "relation", "none"] | None = None,
        detector_top: int | None = None,
        detector_weights: Literal["difference", "log_decay"] | None = None,
        tree_depth: int | None = None,
    ) -> AsyncJob[ConceptFit]:
        """Fit the class `target` of labelled texts (or chats) in the latents of `sae`, as a job: ``.wait()`` for it.

        The concept is stored in the library as `name`, ready for ``Suppress(name)``. `background` is ordinary text, or
        the name of one of `concepts`. Latents that fire on more than `max_rate` of it are left out, unless `keep_dense`.

        Rules and `when` know the concept by its `detector`; ``report["detector"]["expressions"]`` says how to write it.
        `labels` says what of the target's texts is of the concept: all tokens ("sentence"), those of `words`, or those at
        places ("position"; its texts are then ``{"text": …, "spans": [[0, 5]]}``).

        Raises:
            BadRequest: the message names the field. RateLimited: too many jobs wait.
        """
        options = {
            "top": top,
            "by": by,
            "max_rate": max_rate,
            "bins": bins,
            "priors": priors,
            "held_out": held_out,
            "seed": seed,
            "strengths": strengths,
            "tokens_per_text": tokens_per_text,
            "labels": labels,
            "words": words,
            "span_tokens": span_tokens,
            "detector": detector,
            "detector_top": detector_top,
            "detector_weights": detector_weights,
            "tree_depth": tree_depth,
        }
        call = calls.fit_concept(name, sae, concepts, target, background, keep_dense, options)
        return AsyncJob(self, await self._send(call), ConceptFit)

    async def tokenize(self, input: Messages, *, model: str | None = None, **params: Any) -> Tokenization:
        """Token ids and strings of a text (str) or, after the chat template, of messages (list)."""
        return await self._send(calls.tokenize(input, model, params))

    async def health(self) -> bool:
        """Whether the server is up; one attempt, False when nothing answers there."""
        try:
            await self._send(calls.health(), retries=0)
        except (APIConnectionError, ServerError):
            return False
        return True

    async def close(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def _send(self, call: Call[T], *, retries: int | None = None) -> T:
        return self._read(call, await self._answer(call, stream=False, retries=retries))

    async def _connect(self, call: Call[Any]) -> httpx.Response:
        response = await self._answer(call, stream=True)
        try:
            self._check_stream(response)
        except BaseException:
            await response.aclose()
            raise
        return response

    async def _answer(self, call: Call[Any], *, stream: bool, retries: int | None = None) -> httpx.Response:
        """A successful response, unread if `stream`."""
        attempt, allowed = 0, self._retries if retries is None else retries
        while True:
            try:
                response = await self._http.send(self._request(self._http, call, stream=stream), stream=stream)
                if response.is_success:
                    return response
                await response.aread()
                await response.aclose()
            except httpx.RequestError as error:
                wait = self._wait_after_error(attempt, allowed, error, call.method)
            else:
                wait = self._wait_after_answer(attempt, allowed, response)
            await asyncio.sleep(wait)
            attempt += 1


class AsyncLibrary:
    """Stored vectors, concepts, maps and rulesets."""

    def __init__(self, client: AsyncClient) -> None:
        self.vectors = AsyncShelf(client, "vectors")
        self.concepts = AsyncShelf(client, "concepts")
        self.maps = AsyncShelf(client, "maps")
        self.rulesets = AsyncRulesets(client)


class AsyncShelf:
    """The artefacts of one kind."""

    def __init__(self, client: AsyncClient, kind: Kind) -> None:
        self._client = client
        self._kind = kind

    async def list(self) -> list[Artifact]:
        """All of them, without bodies."""
        return await self._client._send(calls.list_artifacts(self._kind))

    async def put(self, name: str, body: Wire | Mapping[str, Any]) -> Artifact:
        """Store a new version under `name`: a `Vector`, or the body as JSON."""
        return await self._client._send(calls.put_artifact(self._kind, name, body))

    async def get(self, name: str) -> Artifact:
        """One, with its body."""
        return await self._client._send(calls.get_artifact(self._kind, name))

    async def delete(self, name: str) -> None:
        """Remove `name`."""
        await self._client._send(calls.delete_artifact(self._kind, name))


class AsyncRulesets:
    """The library's rule sets."""

    def __init__(self, client: AsyncClient) -> None:
        self._client = client

    async def list(self) -> list[Artifact]:
        """All of them, without bodies."""
        return await self._client._send(calls.list_artifacts("rulesets"))

    async def put(
        self,
        name: str,
        ruleset: RulesetLike,
        *,
        description: str | None = None,
        meta: Mapping[str, Any] | None = None,
    ) -> Artifact:
        """Store a new version under `name`: a text, the JSON form, or a `Rules` that has either.

        Raises:
            RuleError: what is wrong with it, and where.
        """
        return await self._client._send(calls.put_ruleset(name, ruleset, description, meta))

    async def get(self, name: str) -> Artifact:
        """One, with its body as it was put, and its normal form."""
        return await self._client._send(calls.get_artifact("rulesets", name))

    async def delete(self, name: str) -> None:
        """Remove `name`."""
        await self._client._send(calls.delete_artifact("rulesets", name))

    async def check(self, ruleset: RulesetLike) -> NormalForm:
        """Its normal form, if the server could run it.

        Raises:
            RuleError: what is wrong with it, and where.
        """
        return await self._client._send(calls.check_ruleset(ruleset))
