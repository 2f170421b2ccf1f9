"""vLLM's endpoint plugin (``vllm/plugins/endpoint_plugins/interface.py``): routes, guard, and the start-up handshake.

On a server that was not started by ``editserver serve`` it adds nothing but the guard, which refuses our fields.
"""

from __future__ import annotations

from argparse import Namespace
from dataclasses import replace
from typing import Any

from fastapi import APIRouter, FastAPI
from fastapi.routing import APIRoute

from editserver import __version__
from editserver.api import (
    errors,
    routes_calibrate,
    routes_catalogue,
    routes_concepts,
    routes_contrast,
    routes_generate,
    routes_jobs,
    routes_library,
    routes_missing,
    routes_rulesets,
)
from editserver.api.capacity import Capacity
from editserver.api.guard import BodyGuard, UnauthorizedEnvelope
from editserver.api.serving import EditServingChat, EditServingCompletion
from editserver.api.state import EditState
from editserver.api.vllm_entry import VLLM_VERSION, OpenAIServingChat, OpenAIServingCompletion, model_shape
from editserver.catalogue import build_catalogue
from editserver.engine.abilities import Abilities
from editserver.engine.compat.core import FORGETFUL, STAGED
from editserver.engine.config import EngineConfig
from editserver.settings import MAX_BODY_BYTES, Settings
from interventions.errors import InterventionError
from interventions.limits import Limits
from interventions.rules.reading import parse_ruleset

HANDSHAKE = "editserver_handshake"

# In this order they are tried: SAE ids are paths, so the longer routes come first, and what is left is missing.
_ROUTES = (
    routes_generate,
    routes_contrast,
    routes_calibrate,
    routes_catalogue,
    routes_concepts,
    routes_jobs,
    routes_library,
    routes_rulesets,
    routes_missing,
)


class HandshakeError(RuntimeError):
    """A worker cannot edit: the server must not start."""


class EditserverEndpoint:
    """The plugin object; vLLM makes one per app."""

    name = "editserver"
    required_tasks = ("generate",)

    def __init__(self) -> None:
        self._app: FastAPI | None = None

    def attach_router(self, app: FastAPI) -> None:
        """Register routes and the guard. Called by vLLM after its own routes, before its middleware."""
        self._app = app
        app.add_exception_handler(InterventionError, errors.handle)
        app.add_middleware(BodyGuard, max_bytes=lambda: _max_bytes(app), edits=lambda: _edits(app))
        app.router.lifespan_context = routes_jobs.cancelling(app.router.lifespan_context)
        stock = any(getattr(route, "path", None) == "/v1/chat/completions" for route in app.routes)
        before = list(app.routes)
        for module in _ROUTES:
            _add_routes(app, module.router)
        if not stock:
            # FastAPI >= 0.137 keeps included routers closed, so vLLM cannot replace its routes by ours: ours go first.
            ours = [route for route in app.routes if route not in before]
            app.router.routes[:] = ours + before

    async def init_state(self, engine_client: Any, state: Any, args: Namespace) -> None:
        """Prove that every worker edits, then exchange the handlers' classes. An exception here stops the server.

        Raises:
            HandshakeError: a worker is not armed, or runs something else than this process.
        """
        if self._app is not None:
            # Around everything, vLLM's API-key check included; the stack is built by now, so it is wrapped as a whole.
            self._app.middleware_stack = UnauthorizedEnvelope(
                self._app.middleware_stack or self._app.build_middleware_stack()
            )
        state.editserver = None
        config = None if engine_client is None else EngineConfig.of(engine_client.vllm_config)
        if config is None:
            return
        answers = await engine_client.collective_rpc(HANDSHAKE)
        stages = engine_client.vllm_config.parallel_config.pipeline_parallel_size
        check_handshake(config, answers, stages)
        told = answers[0]["device"]
        device = None if told is None else Abilities.from_dict(told)
        settings = Settings.of(args)
        if device is not None:
            settings = replace(settings, limits=bounded(settings.limits, device))
        d_model, n_layers, vocab_size, model = model_shape(engine_client.vllm_config)
        tokenizer = engine_client.renderer.get_tokenizer()
        catalogue = build_catalogue(
            config,
            settings,
            d_model=d_model,
            n_layers=n_layers,
            vocab_size=vocab_size,
            tokenizer=tokenizer,
            model=model,
        )
        state.editserver = EditState(
            config,
            settings,
            catalogue,
            Capacity(config.bank_rows),
            VLLM_VERSION,
            model,
            state,
            unheard=why_unheard(stages, engine_client.vllm_config.speculative_config is not None, answers),
            device=device,
        )
        for source in config.saes:
            state.editserver.knowledge(source.id)  # opened now: a file that cannot be used is logged at the start
        parse_ruleset("")  # the grammar is made ready now, not in somebody's first request
        _exchange(state, "openai_serving_chat", OpenAIServingChat, EditServingChat)
        _exchange(state, "openai_serving_completion", OpenAIServingCompletion, EditServingCompletion)


def check_handshake(config: EngineConfig, answers: list[Any], stages: int = 1) -> None:
    """Raise :class:`HandshakeError` unless every worker is armed as configured and runs this version.

    The workers of ``stages > 1`` are armed at their own layers, each layer at all ranks of one stage.
    """
    if not answers:
        raise HandshakeError("no worker answered the handshake: is editserver installed where the workers run?")
    digests = {source.digest for source in config.saes}
    armed: list[int] = []
    for rank, answer in enumerate(answers):
        if not isinstance(answer, dict):
            raise HandshakeError(f"worker {rank} answered the handshake with {answer!r}")
        problems = [answer["error"]] if answer.get("error") else []
        if not answer.get("ok") and not problems:
            problems.append("it is not armed")
        if answer.get("version") != __version__:
            problems.append(f"it runs editserver {answer.get('version')}, this process {__version__}")
        armed += answer.get("armed", ())
        if stages == 1 and sorted(answer.get("armed", ())) != list(config.armed):
            problems.append(f"it armed layers {answer.get('armed')}, configured are {list(config.armed)}")
        if set(answer.get("saes", ())) != digests:
            problems.append("its SAEs have other contents than this process reads")
        if problems:
            raise HandshakeError(f"worker {rank} cannot edit: {'; '.join(problems)}")
    if stages > 1 and sorted(armed) != sorted(config.armed * (len(answers) // stages)):
        raise HandshakeError(f"the stages armed layers {sorted(armed)}, configured are {list(config.armed)}")


def why_unheard(stages: int, drafts: bool, answers: list[Any]) -> str | None:
    """Why rules and gates over a sequence are not served, given the workers' ``answers``; None where they are."""
    if stages > 1:
        return STAGED
    return FORGETFUL if drafts and not all(answer["remembers"] for answer in answers) else None


def bounded(limits: Limits, device: Abilities) -> Limits:
    """The limits with no more inspected at a time than a device's engine has room for."""
    return replace(
        limits,
        inspected_features=min(limits.inspected_features, device.capacity.listed),
        top_k=limits.top_k if device.encode is None else min(limits.top_k, device.encode.top),
    )


def _exchange(state: Any, name: str, stock: type, edited: type) -> None:
    handler: Any = getattr(state, name, None)
    found = type(handler)
    if found is not stock:
        raise HandshakeError(f"vLLM's {name} is a {found.__name__}, not the {stock.__name__} that edits build on")
    handler.__class__ = edited
    handler.editserver = state.editserver


def _add_routes(app: FastAPI, router: APIRouter) -> None:
    for route in router.routes:
        assert isinstance(route, APIRoute)
        app.router.routes.append(route)


def _edits(app: FastAPI) -> bool:
    return getattr(app.state, "editserver", None) is not None


def _max_bytes(app: FastAPI) -> int:
    state: EditState | None = getattr(app.state, "editserver", None)
    return MAX_BODY_BYTES if state is None else state.settings.max_body_bytes
