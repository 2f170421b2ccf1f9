"""delphi's results: ``explanations/{module}_latent{i}.txt``, each a JSON string, and ``scores/{scorer}/…`` beside them.

(eai-delphi 0.1.3, ``delphi/__main__.py``; a score file is a JSON list of judged examples with ``activating`` and
``prediction``.) One explanation per latent and module. An explanation's score is the mean over the scorers ``detection``
and ``fuzz`` of (share of activating examples that were told + share of others that were told) / 2.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from sae_weights.hook import Hook, parse_hook_name
from sae_weights.sae import SAE

from .facts import KnowledgeError
from .imports import Explanation, Imported, explanation_text, feature_index, json_file, parse

MAX_FILE = 1 << 20
SCORERS = ("detection", "fuzz")
_NAME = re.compile(r"(?P<module>.+)_latent(?P<index>\d{1,12})\.txt")


def read(path: Path, sae: SAE) -> Imported:
    """The explanations below ``path`` (a run's folder, or its ``explanations``) of the module that ``sae`` reads.

    Raises:
        KnowledgeError: naming the file that cannot be used; no explanations, or none of the SAE's own place in the model.
    """
    folder = _explanations(path)
    if folder is None:
        raise KnowledgeError(f"{path}: no files named MODULE_latentN.txt, here or in explanations/")
    module = _module(folder, sae)
    imported = Imported("delphi")
    for file in sorted(folder.iterdir()):
        match = _NAME.fullmatch(file.name)
        if match is None or match["module"] != module:
            continue
        index = feature_index(match["index"], sae.n_features, str(file))
        if file.stat().st_size > MAX_FILE:
            raise KnowledgeError(f"{file}: {file.stat().st_size} bytes; an explanation has at most {MAX_FILE}")
        text = explanation_text(parse(file.read_bytes(), str(file)), str(file))
        if text:
            imported.offer(Explanation(index, text, "delphi", _score(folder.parent / "scores", file.name)))
    return imported


def looks_like(path: Path) -> bool:
    """Whether ``path`` is laid out as delphi's results."""
    return _explanations(path) is not None


def _explanations(path: Path) -> Path | None:
    for folder in (path / "explanations", path):
        if folder.is_dir() and any(_NAME.fullmatch(file.name) for file in folder.iterdir()):
            return folder
    return None


def _module(folder: Path, sae: SAE) -> str:
    """The one module whose explanations are for this SAE."""
    matches = (_NAME.fullmatch(file.name) for file in folder.iterdir())
    modules = sorted({match["module"] for match in matches if match is not None})
    fitting = [module for module in modules if _same_place(_hook(module), sae.hook)]
    if len(fitting) != 1:
        raise KnowledgeError(f"{folder}: explains {', '.join(modules[:8])}; this SAE reads {sae.hook}")
    return fitting[0]


def _hook(module: str) -> Hook | None:
    return parse_hook_name(module) or parse_hook_name(f"model.{module}")


def _same_place(hook: Hook | None, other: Hook) -> bool:
    """Also resid_pre(L + 1) and resid_post(L) are one place."""
    if hook is None:
        return False
    return hook == other or (hook.edit_layer is not None and hook.edit_layer == other.edit_layer)


def _score(folder: Path, name: str) -> float | None:
    scores = []
    for scorer in SCORERS:
        file = folder / scorer / name
        if file.is_file():
            judged = json_file(file)
            if not isinstance(judged, list) or not all(isinstance(example, dict) for example in judged):
                raise KnowledgeError(f"{file}: expected a JSON list of judged examples")
            scores += [score] if (score := _balanced_accuracy(judged)) is not None else []
    return sum(scores) / len(scores) if scores else None


def _balanced_accuracy(judged: list[dict[str, Any]]) -> float | None:
    told: dict[bool, list[bool]] = {True: [], False: []}
    for example in judged:
        activating, prediction = example.get("activating"), example.get("prediction")
        if isinstance(activating, bool) and isinstance(prediction, bool | int | float):
            told[activating].append((prediction >= 0.5) == activating)
    if not all(told.values()):
        return None
    return sum(sum(right) / len(right) for right in told.values()) / 2
