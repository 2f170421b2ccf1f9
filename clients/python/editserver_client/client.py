"""The synchronous client."""

from __future__ import annotations

import time
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
from .handles import Job, Jobs
from .interventions import Intervention
from .jobs import ConceptFit
from .responses import ChatResponse, CompletionResponse
from .rules import NormalForm, RulesetLike
from .streams import ChatStream, CompletionStream, Stream
from .wire import Wire


class Client(BaseClient):
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
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        super().__init__(base_url, api_key, timeout, retries, max_retry_wait, headers)
        self._http = httpx.Client(transport=transport, **self._settings)
        self.library = Library(self)
        self.rulesets = self.library.rulesets
        self.jobs = Jobs(self)

    def chat(
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
        return self._send(calls.chat(body))

    def chat_stream(
        self,
        messages: Messages,
        *,
        model: str | None = None,
        interventions: Interventions | None = None,
        inspect: InspectLike | None = None,
        **params: Any,
    ) -> ChatStream:
        """As `chat`, as a stream of events; the request is sent when the stream is entered or first iterated."""
        subject = {"messages": chat_messages(messages)}
        call = calls.chat(generation(subject, model, interventions, inspect, params, stream=True))
        return Stream(ChatResponse, lambda: self._connect(call))

    def complete(
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
        return self._send(calls.complete(body))

    def complete_stream(
        self,
        prompt: Prompt,
        *,
        model: str | None = None,
        interventions: Interventions | None = None,
        inspect: InspectLike | None = None,
        **params: Any,
    ) -> CompletionStream:
        """As `complete`, as a stream of events."""
        call = calls.complete(generation({"prompt": prompt}, model, interventions, inspect, params, stream=True))
        return Stream(CompletionResponse, lambda: self._connect(call))

    def capabilities(self) -> Capabilities:
        """What the server can do: layers, limits, intervention types, schemas."""
        return self._send(calls.capabilities())

    def saes(self) -> list[SAEInfo]:
        """The loaded SAEs."""
        return self._send(calls.saes())

    def sae(self, id: str) -> SAEInfo:
        """One SAE, for example ``client.sae("smollm2-135m/l15")``."""
        return self._send(calls.sae(id))

    def features(self, id: str, q: str | None = None, *, limit: int | None = None) -> list[FeatureInfo]:
        """Features of SAE `id`; `q` searches their labels."""
        return self._send(calls.features(id, q, limit))

    def feature(self, id: str, index: int) -> FeatureCard:
        """Everything known about one feature of SAE `id`."""
        return self._send(calls.feature(id, index))

    def activations(
        self,
        id: str,
        input: str | Sequence[str] | None = None,
        *,
        messages: Messages | None = None,
        features: Sequence[int] | None = None,
        top_k: int | None = None,
    ) -> list[Activations]:
        """What SAE `id` sees in texts (`input`) or a chat (`messages`), without generating."""
        return self._send(calls.activations(id, input, messages, features, top_k))

    def contrast(
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
        return self._send(calls.contrast(id, positive, negative, limit, pool, max_density))

    def calibrate_strength(
        self, intervention: Intervention | Mapping[str, Any], prompts: Texts, *, target_kl: float = 0.5
    ) -> StrengthCalibration:
        """The strength at which the mean next-token KL(clean ‖ edited) over `prompts` reaches `target_kl`.

        Calibrated is the strength of a steer, or the value of an edit_features' first set or add op; what is given
        there sets sign and first guess.

        Raises:
            BadRequest: the target cannot be reached; the message names the largest KL that was.
        """
        return self._send(calls.calibrate_strength(intervention, prompts, target_kl))

    def fit_concept(
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
    ) -> Job[ConceptFit]:
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
        return Job(self, self._send(call), ConceptFit)

    def tokenize(self, input: Messages, *, model: str | None = None, **params: Any) -> Tokenization:
        """Token ids and strings of a text (str) or, after the chat template, of messages (list)."""
        return self._send(calls.tokenize(input, model, params))

    def health(self) -> bool:
        """Whether the server is up; one attempt, False when nothing answers there."""
        try:
            self._send(calls.health(), retries=0)
        except (APIConnectionError, ServerError):
            return False
        return True

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _send(self, call: Call[T], *, retries: int | None = None) -> T:
        return self._read(call, self._answer(call, stream=False, retries=retries))

    def _connect(self, call: Call[Any]) -> httpx.Response:
        response = self._answer(call, stream=True)
        try:
            self._check_stream(response)
        except BaseException:
            response.close()
            raise
        return response

    def _answer(self, call: Call[Any], *, stream: bool, retries: int | None = None) -> httpx.Response:
        """A successful response, unread if `stream`."""
        attempt, allowed = 0, self._retries if retries is None else retries
        while True:
            try:
                response = self._http.send(self._request(self._http, call, stream=stream), stream=stream)
                if response.is_success:
                    return response
                response.read()
                response.close()
            except httpx.RequestError as error:
                wait = self._wait_after_error(attempt, allowed, error, call.method)
            else:
                wait = self._wait_after_answer(attempt, allowed, response)
            time.sleep(wait)
            attempt += 1


class Library:
    """Stored vectors, concepts, maps and rulesets."""

    def __init__(self, client: Client) -> None:
        self.vectors = Shelf(client, "vectors")
        self.concepts = Shelf(client, "concepts")
        self.maps = Shelf(client, "maps")
        self.rulesets = Rulesets(client)


class Shelf:
    """The artefacts of one kind."""

    def __init__(self, client: Client, kind: Kind) -> None:
        self._client = client
        self._kind = kind

    def list(self) -> list[Artifact]:
        """All of them, without bodies."""
        return self._client._send(calls.list_artifacts(self._kind))

    def put(self, name: str, body: Wire | Mapping[str, Any]) -> Artifact:
        """Store a new version under `name`: a `Vector`, or the body as JSON."""
        return self._client._send(calls.put_artifact(self._kind, name, body))

    def get(self, name: str) -> Artifact:
        """One, with its body."""
        return self._client._send(calls.get_artifact(self._kind, name))

    def delete(self, name: str) -> None:
        """Remove `name`."""
        self._client._send(calls.delete_artifact(self._kind, name))


class Rulesets:
    """The library's rule sets."""

    def __init__(self, client: Client) -> None:
        self._client = client

    def list(self) -> list[Artifact]:
        """All of them, without bodies."""
        return self._client._send(calls.list_artifacts("rulesets"))

    def put(
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
        return self._client._send(calls.put_ruleset(name, ruleset, description, meta))

    def get(self, name: str) -> Artifact:
        """One, with its body as it was put, and its normal form."""
        return self._client._send(calls.get_artifact("rulesets", name))

    def delete(self, name: str) -> None:
        """Remove `name`."""
        self._client._send(calls.delete_artifact("rulesets", name))

    def check(self, ruleset: RulesetLike) -> NormalForm:
        """Its normal form, if the server could run it.

        Raises:
            RuleError: what is wrong with it, and where.
        """
        return self._client._send(calls.check_ruleset(ruleset))
