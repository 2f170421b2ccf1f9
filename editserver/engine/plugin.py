"""Entry point of vLLM's ``vllm.general_plugins``: loaded in the API process, the engine core and every worker.

vLLM swallows an exception raised while *importing* an entry point and would go on unedited, so this module imports
nothing that can fail; what can fail happens inside :func:`register`, whose exceptions stop the process.
"""

from __future__ import annotations


def register() -> None:
    """Install the wraps; idempotent. Raises when the installed vLLM is not one this editserver knows."""
    from editserver.engine.compat import core, handshake, llvmlite_guard, load, loops, signatures
    from editserver.engine.compat.version import ENGINE, check_vllm

    check_vllm(ENGINE)
    signatures.check()
    llvmlite_guard.install()
    core.install()
    load.install()
    handshake.install()
    loops.install()
