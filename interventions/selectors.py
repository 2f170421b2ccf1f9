"""Which tokens of a request an intervention selects.

A selector is a union of half-open ranges over *absolute* positions and a set of token ids. Range bounds are either
absolute or counted from the end of the prompt (``prompt_len + offset``), so a selector means the same under chunked
prefill, preemption and batching: a token's phase is a function of its position and the request's prompt length only.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import torch

from interventions.maps.mentions import mention_ends, mention_positions

UNBOUNDED = 2**31 - 1
"""Upper bound of a range that never ends (positions are int32)."""


class Bound(msgspec.Struct, frozen=True, array_like=True, order=True):
    """A position: ``offset``, or ``prompt_len + offset`` when ``from_prompt_end``."""

    from_prompt_end: bool
    offset: int

    def resolve(self, prompt_len: int) -> int:
        """The absolute position, clipped below at 0."""
        position = self.offset + (prompt_len if self.from_prompt_end else 0)
        return max(0, min(position, UNBOUNDED))


START = Bound(False, 0)
END = Bound(False, UNBOUNDED)
PROMPT_END = Bound(True, 0)


class Range(msgspec.Struct, frozen=True, array_like=True, order=True):
    """Positions ``start <= p < stop``."""

    start: Bound
    stop: Bound


class Selector(msgspec.Struct, frozen=True, array_like=True, order=True):
    """Union of ``ranges``, of the tokens whose id is in ``token_ids`` and of mentions; without position 0 unless
    ``include_bos``."""

    ranges: tuple[Range, ...] = ()
    token_ids: tuple[int, ...] = ()
    include_bos: bool = False
    ends: tuple[tuple[int, ...], ...] = ()
    """Token sequences: selects the last token of every occurrence, anywhere (looks back only)."""
    inside: tuple[tuple[int, ...], ...] = ()
    """Token sequences: selects all tokens of every occurrence within the prompt. Depends on later tokens, so it is
    resolved to ``ranges`` as soon as the prompt is known (:meth:`resolved`), before digest, salt and engine."""

    def to_bytes(self) -> bytes:
        """What a digest takes in. Selectors without mentions came first: their bytes stay what they were."""
        if not (self.ends or self.inside):
            return msgspec.msgpack.encode((self.ranges, self.token_ids, self.include_bos))
        return msgspec.msgpack.encode(self)

    def resolved(self, prompt: Sequence[int]) -> Selector:
        """The same selection for one prompt (token ids), with the mentions of ``inside`` as ranges of positions."""
        if not self.inside:
            return self
        positions = mention_positions(prompt, self.inside, "all", self.include_bos)
        found = [Selector((Range(Bound(False, p), Bound(False, p + 1)),)) for p in positions]
        rest = Selector(self.ranges, self.token_ids, self.include_bos)
        merged = union([rest, *found], self.include_bos)
        return msgspec.structs.replace(merged, ends=self.ends)

    @property
    def needs_prompt_len(self) -> bool:
        """Whether the selection depends on where the prompt ends (then the prompt length enters the cache salt)."""
        return any(bound.from_prompt_end for r in self.ranges for bound in (r.start, r.stop))

    def intervals(self, prompt_len: int) -> list[tuple[int, int]]:
        """The ranges for one prompt length: sorted, disjoint, non-empty ``(start, stop)``, position 0 handled."""
        first = 0 if self.include_bos else 1
        resolved = sorted((max(first, r.start.resolve(prompt_len)), r.stop.resolve(prompt_len)) for r in self.ranges)
        merged: list[tuple[int, int]] = []
        for start, stop in resolved:
            if start >= stop:
                continue
            if merged and start <= merged[-1][1]:
                merged[-1] = (merged[-1][0], max(merged[-1][1], stop))
            else:
                merged.append((start, stop))
        return merged

    def mask(self, positions: torch.Tensor, token_ids: torch.Tensor, prompt_len: int) -> torch.Tensor:
        """Which tokens are selected.

        Args:
            positions: absolute positions, shape ``[n]``, any integer dtype.
            token_ids: ids of the same tokens, shape ``[n]``; with ``ends``, a request's tokens from position 0 on.
            prompt_len: length of the request's original prompt.

        Returns:
            bool tensor of shape ``[n]``.
        """
        selected = torch.zeros_like(positions, dtype=torch.bool)
        for start, stop in self.intervals(prompt_len):
            selected |= (positions >= start) & (positions < stop)
        if self.token_ids:
            wanted = torch.tensor(self.token_ids, dtype=token_ids.dtype, device=token_ids.device)
            matched = torch.isin(token_ids, wanted)
            selected |= matched if self.include_bos else matched & (positions > 0)
        if self.inside:
            raise ValueError("mentions inside the prompt are not resolved to positions yet")
        if self.ends:
            if not torch.equal(positions, torch.arange(len(positions), device=positions.device)):
                raise ValueError("mentions are found in whole sequences only: expected the positions 0, 1, 2, …")
            ended = torch.from_numpy(mention_ends(token_ids.tolist(), self.ends)).to(selected.device)
            selected |= ended if self.include_bos else ended & (positions > 0)
        return selected

    def count(self, token_ids: Sequence[int], prompt_len: int) -> tuple[int, int]:
        """``(selected, selected in the prompt)`` among the tokens ``token_ids`` at positions 0, 1, 2, …"""
        if not token_ids:
            return 0, 0
        ids = torch.as_tensor(token_ids, dtype=torch.int64)
        selected = self.mask(torch.arange(len(ids)), ids, prompt_len)
        return int(selected.sum()), int(selected[:prompt_len].sum())


def union(parts: Sequence[Selector], include_bos: bool) -> Selector:
    """The canonical union: equal selections get equal structs as far as that is decidable without a prompt.

    Ranges that are empty for every prompt vanish (nothing left: a selector without ranges and tokens), overlapping and
    adjacent ones merge (``prompt`` with ``generated`` is ``all``), ``all`` swallows token ids, and ``include_bos`` is
    kept only where a range or a token id could select position 0.
    """
    ranges = {r for part in parts for r in part.ranges if not _is_empty(r)}
    token_ids = tuple(sorted({t for part in parts for t in part.token_ids}))
    include_bos = include_bos and (bool(token_ids) or any(_may_hold_zero(r) for r in ranges))
    if not include_bos:  # "from 1" is "from 0" when position 0 is out anyway
        ranges = {Range(START, r.stop) if r.start == Bound(False, 1) else r for r in ranges}
        if token_ids or len(ranges) > 1:
            ranges.discard(Range(START, Bound(False, 1)))
    absolute = [r for r in ranges if not (r.start.from_prompt_end or r.stop.from_prompt_end)]
    # On the axis that has its origin at the end of the prompt, START and END are the two infinities.
    relative = [r for r in ranges if r.start.from_prompt_end and (r.stop.from_prompt_end or r.stop == END)]
    relative += [r for r in ranges if r.start == START and r.stop.from_prompt_end]
    mixed = ranges.difference(absolute, relative)
    merged = set(_merge(absolute, -1)) | set(_merge(relative, -UNBOUNDED - 1)) | mixed
    if Range(START, END) in merged:
        return Selector((Range(START, END),), (), include_bos)
    return Selector(tuple(sorted(merged)), token_ids, include_bos)


def _is_empty(r: Range) -> bool:
    """Whether no position of any prompt is in ``r``: bounds on one axis, in the wrong order."""
    if r.start.from_prompt_end != r.stop.from_prompt_end:
        return r.stop == START
    return r.start.offset >= r.stop.offset


def _may_hold_zero(r: Range) -> bool:
    """Whether position 0 is in ``r`` for some prompt (of at least one token)."""
    return r.start.offset < 0 if r.start.from_prompt_end else r.start.offset == 0


def _merge(ranges: Sequence[Range], first: int) -> list[Range]:
    """Disjoint, non-adjacent ranges with the same union; ``START`` is taken to be at offset ``first`` of their axis."""

    def start(r: Range) -> int:
        return first if r.start == START else r.start.offset

    merged: list[Range] = []
    for r in sorted(ranges, key=start):
        if not merged or start(r) > merged[-1].stop.offset:
            merged.append(r)
        elif r.stop.offset > merged[-1].stop.offset:
            merged[-1] = Range(merged[-1].start, r.stop)
    return merged


ALL = Selector((Range(START, END),))
PROMPT = Selector((Range(START, PROMPT_END),))
GENERATED = Selector((Range(PROMPT_END, END),))
LAST_PROMPT_TOKEN = Selector((Range(Bound(True, -1), PROMPT_END),))


def slice_selector(start: int | None, stop: int | None) -> Selector:
    """``{"from": start, "to": stop}``: half-open, negatives count from the prompt's end, no ``stop`` = to the end."""
    lower = START if start is None else Bound(start < 0, start)
    upper = END if stop is None else Bound(stop < 0, stop)
    return Selector((Range(lower, upper),))
