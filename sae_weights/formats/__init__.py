"""Checkpoint formats: one file per published layout, each returning the canonical SAE."""

from __future__ import annotations

import difflib
from dataclasses import replace
from pathlib import Path

from sae_weights.errors import SAEFormatError
from sae_weights.sae import SAE

from .base import Format, Hints, Origin
from .bussmann import Bussmann
from .circuit_tracer import CircuitTracer
from .clt import CLT
from .connor_rob import ConnorRob
from .crosscoder_model_diff import CrosscoderModelDiff
from .dictionary_learning import DictionaryLearning
from .e2e import EndToEndSAE
from .gemma_scope import GemmaScope
from .gemma_scope_2 import GemmaScope2
from .goodfire import Goodfire
from .itda import ITDADictionary
from .llama_scope import LlamaScope
from .llama_scope_r1 import LlamaScopeR1
from .llamascopium import Llamascopium
from .native import Native, save_native
from .openai_gpt2 import OpenAIGPT2
from .polysae import PolySAEFolder
from .qwen_scope import QwenScope
from .saelens import SAELens, save_saelens
from .sparsify import Sparsify
from .top_afa import TopAFASAE

FORMATS: tuple[Format, ...] = (
    Native(),
    GemmaScope(),
    GemmaScope2(),
    LlamaScope(),
    LlamaScopeR1(),
    QwenScope(),
    Goodfire(),
    ConnorRob(),
    Llamascopium(),
    CircuitTracer(),
    CLT(),
    DictionaryLearning(),
    Sparsify(),
    TopAFASAE(),
    Bussmann(),
    ITDADictionary(),
    PolySAEFolder(),
    CrosscoderModelDiff(),
    EndToEndSAE(),
    OpenAIGPT2(),
    SAELens(),
)
"""In the order in which they are asked whether a path is theirs; SAELens, whose test is the loosest, last."""

_LONGEST_MESSAGE = 2000

__all__ = ["FORMATS", "Format", "Hints", "Origin", "load_sae", "save_native", "save_saelens"]


def load_sae(
    path: str | Path,
    *,
    format: str | None = None,
    hints: Hints | None = None,
    norm_scaling_factor: float | None = None,
) -> SAE:
    """Open a folder or file of any registered format as a canonical SAE; reads headers and vectors, no matrix.

    ``format`` names the format; without it the path is recognised by its file names and config keys. ``hints`` hold what
    the checkpoint may not say (``norm_scaling_factor`` is short for that hint). Raises SAEFormatError naming the file
    and the key.
    """
    place = Path(path).expanduser()
    hints = hints or Hints()
    if norm_scaling_factor is not None:
        hints = replace(hints, norm_scaling_factor=norm_scaling_factor)
    if not place.exists():
        raise SAEFormatError(f"{place}: no such folder or file")
    found = _named(format) if format else recognise(place)
    try:
        sae = found.open(place, hints)
    except SAEFormatError as error:
        # What does not fit may show only where parts meet, which know of no file; and names in a file may be endless.
        message = str(error) if str(place) in str(error) else f"{place}: {error}"
        if len(message) > _LONGEST_MESSAGE:
            message = f"{message[:_LONGEST_MESSAGE]} …"
        raise SAEFormatError(message) from error
    except (RecursionError, UnicodeDecodeError, MemoryError) as error:
        raise SAEFormatError(f"{place}: cannot be read as {found.title} ({type(error).__name__})") from error
    except OSError as error:
        raise SAEFormatError(f"{place}: cannot be read ({error.strerror or error})") from error
    if hints.groups is not None:
        sae = sae.prefix(hints.groups)
    if hints.threshold is not None:
        sae = sae.thresholded(hints.threshold)
    if hints.model_name is not None and "model_name" not in sae.metadata:
        sae.metadata = {**sae.metadata, "model_name": hints.model_name}
    sae.origin = Origin(str(place.absolute()), found.name, hints)
    return sae


def recognise(place: Path) -> Format:
    """The format whose files lie at ``place``; raises SAEFormatError that lists the known layouts."""
    for one in FORMATS:
        if one.recognises(place):
            return one
    held = sorted(entry.name for entry in place.iterdir())[:12] if place.is_dir() else [place.name]
    known = "; ".join(f"{one.title}: {one.files}" for one in FORMATS)
    raise SAEFormatError(f"{place}: no known layout of an SAE; it holds {held}. Known are {known}")


def _named(name: str) -> Format:
    for one in FORMATS:
        if one.name == name:
            return one
    names = [one.name for one in FORMATS]
    near = difflib.get_close_matches(name, names, n=1)
    hint = f" (did you mean {near[0]!r}?)" if near else ""
    raise SAEFormatError(f"format: {name!r}; expected one of {', '.join(names)}{hint}")
