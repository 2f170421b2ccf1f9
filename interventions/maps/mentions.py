"""Where an entity is mentioned, in token ids.

A name has several tokenisations: as given, behind a space, in other cases. A mention is any contiguous occurrence of one of
them. Whether a token is the *last* of a mention depends on it and earlier tokens only, so it can be asked anywhere, also
while tokens are generated. Whether a token lies *inside* a mention depends on later ones: that is asked of the prompt, and
the positions found are part of the request's digest.

Looking back only, "Paris" is also found at the start of "Parisian" where the tokenizer splits that into Paris·ian, and
"New York" inside "New York City": nested and overlapping mentions all count.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt

Bits = npt.NDArray[np.bool_]
Case = Literal["as_given", "lower", "upper", "title", "capitalised"]

CASES: Mapping[Case, Callable[[str], str]] = {
    "as_given": lambda name: name,
    "lower": str.lower,
    "upper": str.upper,
    "title": str.title,
    "capitalised": str.capitalize,
}


class MentionError(ValueError):
    """A name that cannot be matched; the message says why."""


@dataclass(frozen=True)
class Surfaces:
    """The token sequences that count as a mention.

    Attributes:
        sequences: sorted and distinct, none empty.
        texts: sequence → the strings that encode to it.
    """

    sequences: tuple[tuple[int, ...], ...]
    texts: Mapping[tuple[int, ...], tuple[str, ...]]

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence: a chunk needs the ``longest − 1`` tokens before it."""
        return max(map(len, self.sequences))


def surfaces(
    names: Iterable[str],
    encode: Callable[[str], Sequence[int]],
    cases: Sequence[Case] = ("as_given",),
    spaces: bool = True,
) -> Surfaces:
    """All ways in which the names tokenise.

    Args:
        names: the entity's names, outer white space ignored.
        encode: text → token ids, without special tokens.
        cases: case variants; "as_given" is not implied.
        spaces: with a leading space too, as within a sentence.

    Raises:
        MentionError: no name, an empty one, no case, an unknown case, or a text without tokens.
    """
    found: dict[tuple[int, ...], list[str]] = {}
    unknown = [case for case in cases if case not in CASES]
    if unknown or not cases:
        raise MentionError(
            f"case {unknown[0]!r} is none of {', '.join(get_args(Case))}" if unknown else "no case is asked for"
        )
    for given in names:
        name = given.strip()
        if not name:
            raise MentionError(f"{given!r} is not a name")
        for case in cases:
            for text in (CASES[case](name), " " + CASES[case](name))[: 2 if spaces else 1]:
                ids = tuple(encode(text))
                if not ids:
                    raise MentionError(f"{text!r} has no tokens")
                texts = found.setdefault(ids, [])
                if text not in texts:
                    texts.append(text)
    if not found:
        raise MentionError("no name is given")
    sequences = tuple(sorted(found))
    return Surfaces(sequences, {sequence: tuple(found[sequence]) for sequence in sequences})


def mention_ends(token_ids: Sequence[int], sequences: Sequence[Sequence[int]], before: Sequence[int] = ()) -> Bits:
    """bool ``[n]``: which tokens are the last of a mention.

    Args:
        token_ids: the tokens asked about.
        sequences: :attr:`Surfaces.sequences`.
        before: tokens that precede them; the longest sequence less one suffice, more do no harm.
    """
    line = [*before, *token_ids]
    ends = np.zeros(len(line), np.bool_)
    for _, stop in spans(line, sequences):
        ends[stop - 1] = True
    return ends[len(before) :]


def spans(token_ids: Sequence[int], sequences: Sequence[Sequence[int]]) -> list[tuple[int, int]]:
    """Every mention as half-open ``(start, stop)``, overlapping and nested ones included; sorted by stop, then start."""
    by_last: dict[int, set[tuple[int, ...]]] = {}
    for sequence in sequences:
        by_last.setdefault(sequence[-1], set()).add(tuple(sequence))
    longest_first = {last: sorted(ending, key=len, reverse=True) for last, ending in by_last.items()}
    ids = tuple(token_ids)
    return [
        (stop - len(sequence), stop)
        for stop, token in enumerate(ids, start=1)
        for sequence in longest_first.get(token, ())
        if len(sequence) <= stop and ids[stop - len(sequence) : stop] == sequence
    ]


def mention_positions(
    prompt_ids: Sequence[int],
    sequences: Sequence[Sequence[int]],
    tokens: Literal["last", "all"],
    include_bos: bool = False,
) -> tuple[int, ...]:
    """Sorted positions of the prompt that a mention's last token or all its tokens take, for the request's digest.

    Position 0 is never among them unless ``include_bos``; a mention that starts there keeps its other tokens.
    """
    found = spans(prompt_ids, sequences)
    taken = {p for start, stop in found for p in ((stop - 1,) if tokens == "last" else range(start, stop))}
    return tuple(sorted(p for p in taken if p > 0 or include_bos))
