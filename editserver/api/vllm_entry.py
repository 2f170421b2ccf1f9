"""Where the pieces of vLLM's OpenAI server are that editserver builds on. Nothing else here imports ``vllm.entrypoints``.

Paths of vLLM 0.32 and 0.33: ``vllm/entrypoints/openai/{chat_completion,completion}/{protocol,serving,api_router}.py``,
``vllm/entrypoints/launchers/{cli_args,api_server/entry}.py``.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence
from typing import Any

from vllm.entrypoints.openai.chat_completion.api_router import create_chat_completion
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest, ChatCompletionResponse
from vllm.entrypoints.openai.chat_completion.serving import OpenAIServingChat
from vllm.entrypoints.openai.completion.api_router import create_completion
from vllm.entrypoints.openai.completion.protocol import CompletionRequest, CompletionResponse
from vllm.entrypoints.openai.completion.serving import OpenAIServingCompletion
from vllm.entrypoints.serve.engine.protocol import ErrorResponse
from vllm.entrypoints.serve.utils.api_utils import validate_json_request
from vllm.version import __version__ as VLLM_VERSION

__all__ = [
    "VLLM_VERSION",
    "ChatCompletionRequest",
    "ChatCompletionResponse",
    "CompletionRequest",
    "CompletionResponse",
    "ErrorResponse",
    "OpenAIServingChat",
    "OpenAIServingCompletion",
    "create_chat_completion",
    "create_completion",
    "parse_serve_args",
    "run",
    "validate_json_request",
]


def parse_serve_args(argv: Sequence[str]) -> Namespace:
    """vLLM's own parser for ``serve``; it prints and exits on what it does not know (exit code 2)."""
    from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = make_arg_parser(FlexibleArgumentParser(prog="editserver serve"))
    args: Namespace = parser.parse_args(list(argv))
    if args.model_tag is not None:
        args.model = args.model_tag
    validate_parsed_serve_args(args)
    return args


def run(args: Namespace) -> None:
    """Run vLLM's OpenAI server until it is stopped (``vllm/entrypoints/launchers/api_server/entry.py: main``)."""
    import uvloop
    from vllm.entrypoints.launchers.api_server.entry import run_server
    from vllm.entrypoints.serve.utils.api_utils import cli_env_setup
    from vllm.logger import configure_logging_from_args

    cli_env_setup()
    configure_logging_from_args(args)
    uvloop.run(run_server(args))


def model_shape(vllm_config: Any) -> tuple[int, int, int, str]:
    """``(d_model, n_layers, vocab_size, served name)`` of the model that a ``VllmConfig`` describes."""
    model = vllm_config.model_config
    text = model.hf_text_config
    served = model.served_model_name
    name = served if isinstance(served, str) else served[0]
    return int(model.get_hidden_size()), int(text.num_hidden_layers), int(model.get_vocab_size()), name
