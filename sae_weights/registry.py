"""The registry of published dictionaries: which file of which repository an id ``release/sae_id`` means.

The facts are those of SAELens' ``pretrained_saes.yaml`` (MIT licence, ``registries/LICENSE-sae-lens``): repository,
path, loader, model, Neuronpedia id, norm scaling factor, overrides. They ship as data and are refreshed into the user's
cache by ``editserver sae registry --refresh``; the refreshed file wins.
"""

from __future__ import annotations

import difflib
import itertools
import json
import lzma
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

from .cache import cache_root
from .errors import SAEFormatError
from .formats.base import Hints

FILE = "saelens.json.xz"
SHIPPED = Path(__file__).parent / "registries" / FILE

LONGEST_YAML = 64 << 20
"""No file of SAELens' kind is longer (bytes); 6.54.12's has 1.5 MB."""

_COLUMNS = ("path", "l0", "neuronpedia", "norm_scaling_factor", "variance_explained")
_QWEN_K = re.compile(r"-L0_(\d+)$")
_LAYER = re.compile(r"layer_(\d+)")
_HOOK_ID = re.compile(r"(?:blocks\.\d+\.[\w.]*?hook_[a-z_]+?|hook_embed)(?=__|$)")


@dataclass(frozen=True)
class Entry:
    """One published dictionary.

    Attributes:
        path: folder or file in ``repo``, as SAELens' loader takes it.
        loader: SAELens' name of the layout: ``sae_lens``, ``gemma_2``, ``qwen_scope`` …
        l0, variance_explained: as published; ``norm_scaling_factor``: √d / E‖x‖ where the dictionary was trained on scaled
            inputs.
        overrides: configuration keys that the published configuration lacks or has wrong.
    """

    release: str
    sae_id: str
    repo: str
    path: str
    loader: str
    model: str
    neuronpedia: str | None = None
    l0: float | None = None
    norm_scaling_factor: float | None = None
    variance_explained: float | None = None
    overrides: Mapping[str, Any] = field(default_factory=dict)

    @property
    def id(self) -> str:
        """``release/sae_id``."""
        return f"{self.release}/{self.sae_id}"

    @property
    def hub_path(self) -> str:
        """Folder or file in ``repo`` that holds it; one layer of a cross-layer transcoder is a pair of files."""
        return f"W_enc_{self.path}.safetensors" if self.loader == "mntss_clt_layer_transcoder" else self.path

    def hook(self) -> tuple[str | None, str | None]:
        """(hook read, hook written) in TransformerLens' names where the checkpoint does not say them itself."""
        if "hook_name" in self.overrides:
            return str(self.overrides["hook_name"]), None
        layer = _LAYER.search(self.path)
        at = f"blocks.{layer[1]}" if layer else ""
        if self.loader == "gemma_2_transcoder" and layer:
            return f"{at}.ln2.hook_normalized", f"{at}.hook_mlp_out"
        if self.loader == "gemma_2":
            if "embedding" in self.path:
                return "hook_embed", None
            kind = next((k for k in ("res", "mlp", "att") if re.search(rf"-{k}$", self.repo)), None)
            name = {"res": "hook_resid_post", "mlp": "hook_mlp_out", "att": "attn.hook_z"}.get(kind or "")
            return (f"{at}.{name}", None) if layer and name else (None, None)
        if self.loader in ("goodfire", "deepseek_r1"):
            number = re.search(r"-l(\d+)\.pth?$", self.path)
            return (f"blocks.{number[1]}.hook_resid_post" if number else None), None
        if self.loader == "temporal" and (stated := _HOOK_ID.match(self.sae_id)):
            return stated[0], None
        return None, None

    def hints(self) -> Hints:
        """What the registry knows and the checkpoint may not say."""
        read, written = self.hook()
        k = _QWEN_K.search(self.repo) if self.loader == "qwen_scope" else None
        return Hints(
            hook=read,
            hook_out=written,
            k=int(k[1]) if k else None,
            norm_scaling_factor=self.norm_scaling_factor,
            model_name=self.model,
            overrides=dict(self.overrides) if self.overrides and self.loader == "sae_lens" else None,
        )

    def as_dict(self) -> dict[str, Any]:
        """The facts that provenance records; what is not known is left out."""
        stated = {
            "id": self.id,
            "loader": self.loader,
            "model": self.model,
            "neuronpedia": self.neuronpedia,
            "l0": self.l0,
            "norm_scaling_factor": self.norm_scaling_factor,
            "variance_explained": self.variance_explained,
            "overrides": dict(self.overrides) or None,
        }
        return {name: value for name, value in stated.items() if value is not None}


class Registry:
    """All releases of one version of the registry.

    Attributes:
        version: the ``sae-lens`` release whose facts these are.
        path: the file they were read from; None before they are written.
    """

    def __init__(self, version: str, releases: Mapping[str, Mapping[str, Any]], path: Path | None = None) -> None:
        self.version = version
        self.path = path
        self._releases = releases

    @cached_property
    def _at(self) -> dict[str, dict[str, int]]:
        return {name: {sae_id: i for i, sae_id in enumerate(r["ids"])} for name, r in self._releases.items()}

    @property
    def releases(self) -> tuple[str, ...]:
        """Names of the releases, in the registry's order."""
        return tuple(self._releases)

    @cached_property
    def repos(self) -> frozenset[str]:
        """Repositories that some release names."""
        return frozenset(str(r["repo"]) for r in self._releases.values())

    def __len__(self) -> int:
        return sum(len(r["ids"]) for r in self._releases.values())

    def __iter__(self) -> Iterator[Entry]:
        for name, release in self._releases.items():
            for i in range(len(release["ids"])):
                yield self._entry(name, i)

    def __contains__(self, source: str) -> bool:
        release, _, sae_id = source.partition("/")
        return sae_id in self._at.get(release, {})

    def _entry(self, name: str, i: int) -> Entry:
        release = self._releases[name]
        stated = {column: release[column][i] for column in _COLUMNS if column in release}
        path = stated.pop("path", None)
        return Entry(
            release=name,
            sae_id=release["ids"][i],
            repo=release["repo"],
            path=release["ids"][i] if path is None else path,
            loader=release["loader"],
            model=release["model"],
            overrides=release.get("overrides", {}),
            **stated,
        )

    def get(self, source: str) -> Entry | None:
        """The entry of ``release/sae_id``; a release with one dictionary may be named alone."""
        release, _, sae_id = source.partition("/")
        known = self._at.get(release)
        if known is None:
            return None
        if not sae_id and len(known) == 1:
            return self._entry(release, 0)
        return self._entry(release, known[sae_id]) if sae_id in known else None

    def search(self, text: str) -> Iterator[Entry]:
        """Entries in whose id, model, repository or Neuronpedia id every word of ``text`` stands, in order."""
        words = text.lower().split()
        for entry in self:
            fields = f"{entry.id} {entry.model} {entry.repo} {entry.neuronpedia or ''}".lower()
            if all(word in fields for word in words):
                yield entry

    def nearest(self, source: str, count: int = 3) -> list[str]:
        """Ids that resemble ``source``, best first: of its release if that is known, else of the nearest release."""
        release, _, sae_id = source.partition("/")
        known = release in self._at
        names = [release] if known else difflib.get_close_matches(release, self._at, n=2, cutoff=0.7)
        found: list[str] = []
        for name in names:
            ids = list(self._at[name])
            near = difflib.get_close_matches(sae_id, ids, n=8 * count, cutoff=0.5) if sae_id else []
            # layer_20/…/average_l0_70 is nearer to layer_20/…/average_l0_71 than to layer_21/…/average_l0_70.
            near.sort(key=lambda one: -_parts_in_common(one, sae_id))
            found += [f"{name}/{one}" for one in near or ids[:count]]
        return found[:count]

    def write(self, path: Path) -> None:
        """Write the data file; the same facts give the same bytes."""
        path.parent.mkdir(parents=True, exist_ok=True)
        stated = {
            "source": "sae-lens: pretrained_saes.yaml",
            "licence": "MIT, Copyright (c) 2023 Joseph Bloom",
            "version": self.version,
            "releases": self._releases,
        }
        text = json.dumps(stated, ensure_ascii=False, separators=(",", ":"))
        temporary = path.with_name(f"{path.name}.{os.getpid()}.part")
        temporary.write_bytes(lzma.compress(text.encode(), preset=9 | lzma.PRESET_EXTREME))
        temporary.replace(path)

    @classmethod
    def read(cls, path: Path) -> Registry:
        """Read a data file.

        Raises:
            SAEFormatError: it is not one; names the file and the mend.
        """
        try:
            stated = json.loads(lzma.decompress(path.read_bytes()))
            registry = cls(str(stated["version"]), stated["releases"], path)
            for release in registry._releases.values():
                count = len(release["ids"])
                if any(len(release[c]) != count for c in _COLUMNS if c in release) or not (
                    isinstance(release["repo"], str) and isinstance(release["loader"], str) and release["model"]
                ):
                    raise ValueError("a release's columns do not fit together")
        except (OSError, lzma.LZMAError, ValueError, KeyError, TypeError) as error:
            raise SAEFormatError(
                f"{path}: not a registry of dictionaries ({error}); delete it, or make it anew with "
                "`editserver sae registry --refresh`"
            ) from None
        return registry

    @classmethod
    def of_yaml(cls, text: str | bytes, version: str, where: str = "pretrained_saes.yaml") -> Registry:
        """Take over the facts of SAELens' YAML file.

        Raises:
            SAEFormatError: it is not that file; names the release and the key.
        """
        import yaml  # type: ignore[import-untyped]

        try:
            stated = yaml.load(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
        except yaml.YAMLError as error:
            raise SAEFormatError(f"{where}: not YAML ({str(error).splitlines()[0]})") from None
        if not isinstance(stated, dict) or not stated:
            raise SAEFormatError(f"{where}: expected a mapping of releases")
        return cls(version, {str(name): _release(where, str(name), value) for name, value in stated.items()})


def _parts_in_common(one: str, other: str) -> int:
    """How many leading parts two paths share."""
    pairs = zip(one.split("/"), other.split("/"), strict=False)
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))


def _release(where: str, name: str, value: Any) -> dict[str, Any]:
    if "/" in name:
        raise SAEFormatError(f"{where}: release {name!r}: a release's name has no '/'")
    if not isinstance(value, dict) or not isinstance(value.get("saes"), list) or not value["saes"]:
        raise SAEFormatError(f"{where}: release {name!r}: no list 'saes'")
    for key in ("repo_id", "model"):
        if not isinstance(value.get(key), str):
            raise SAEFormatError(f"{where}: release {name!r}: no {key!r}")
    release: dict[str, Any] = {
        "repo": value["repo_id"],
        "model": value["model"],
        "loader": value.get("conversion_func") or "sae_lens",
        "ids": [],
    }
    if value.get("config_overrides"):
        release["overrides"] = value["config_overrides"]
    columns: dict[str, list[Any]] = {column: [] for column in _COLUMNS}
    for i, sae in enumerate(value["saes"]):
        if not isinstance(sae, dict) or not isinstance(sae.get("id"), str) or "path" not in sae:
            raise SAEFormatError(f"{where}: release {name!r}: saes[{i}]: no 'id' or 'path'")
        release["ids"].append(sae["id"])
        path = str(sae["path"])
        columns["path"].append(None if path == sae["id"] else path)
        for column in _COLUMNS:
            if column != "path":
                columns[column].append(sae.get(column))
    return release | {name: values for name, values in columns.items() if any(v is not None for v in values)}


def user_file() -> Path:
    """Where a refreshed registry is kept."""
    return cache_root() / "registries" / FILE


def registry() -> Registry:
    """The registry in force: the refreshed one if there is one, else the one that ships."""
    path = user_file() if user_file().exists() else SHIPPED
    return _read(path, path.stat().st_mtime_ns)


@lru_cache(maxsize=2)
def _read(path: Path, _written: int) -> Registry:
    return Registry.read(path)
