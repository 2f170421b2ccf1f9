"""How much of everything the device reserves at start: nothing is allocated later."""

from __future__ import annotations

from dataclasses import dataclass

MOST_HISTORIES = 64
"""Requests that look for mentions at a time: the others wait."""


class CapacityError(ValueError):
    """The resident programs do not fit into what was reserved; ``what`` names the table."""

    def __init__(self, what: str, needed: int, capacity: int) -> None:
        super().__init__(f"the running requests need {needed} {what}, but the device has room for {capacity}")
        self.what, self.needed, self.capacity = what, needed, capacity


@dataclass(frozen=True)
class Capacity:
    """Numbers of entries; ``of`` derives all from what the server is started with.

    Attributes:
        tokens: of one batch, padding included.
        rows: requests of one batch.
        residents: requests with programs or inspections, waiting ones that were preempted included.
        selectors, intervals, wanted_ids: of all residents.
        channels, ops, reads: of all residents at one layer.
        request_channels, request_reads: of one resident at one layer (scratch per token).
        listed: inspected latents of one resident at one layer.
        members: columns of activations that come from whole dictionaries, per token.
        bank_rows: rows of the bank.
        gates: gates over sequences of all residents at one layer.
        request_gates: gates over sequences of one resident at one layer.
        mentions, mention_ids: token sequences that selectors of all residents look for, and the tokens in them.
        history, history_rows: positions per request of which the device keeps the token, and requests; 0: nobody may look for
            mentions.
    """

    tokens: int
    rows: int
    residents: int
    selectors: int
    intervals: int
    wanted_ids: int
    channels: int
    ops: int
    reads: int
    request_channels: int
    request_reads: int
    listed: int
    members: int
    bank_rows: int
    gates: int = 0
    request_gates: int = 0
    mentions: int = 0
    mention_ids: int = 0
    history: int = 0
    history_rows: int = 0

    @classmethod
    def of(
        cls,
        *,
        tokens: int,
        rows: int,
        bank_rows: int,
        instructions: int = 1024,
        inspected: int = 256,
        selectors: int = 64,
        selector_tokens: int = 1024,
        channels_of_a_request: int | None = None,
        members: int = 64,
        gates: int = 64,
        history: int = 0,
    ) -> Capacity:
        """From the runner's batch (``tokens``, ``rows``) and the request limits (``interventions.limits.Limits``).

        ``channels_of_a_request`` at one layer: as many as it may have instructions, unless less is said.

        ``history`` is the model's longest sequence where mentions shall be found: 4 bytes per position of so many requests.

        Twice as many residents as rows, for preempted requests. One request at its limits always fits next to all others at
        an average of 64 channels and ops, 4 selectors and 32 wanted ids.
        """
        residents = 2 * rows
        own = instructions if channels_of_a_request is None else min(instructions, channels_of_a_request)
        return cls(
            tokens=tokens,
            rows=rows,
            residents=residents,
            selectors=selectors + 4 * residents,
            intervals=2 * (selectors + 4 * residents),
            wanted_ids=selector_tokens * 4 + 32 * residents,
            channels=instructions + 64 * residents,
            ops=instructions + 64 * residents,
            reads=2 * instructions + inspected + 64 * residents,
            request_channels=own,
            request_reads=2 * own,
            listed=inspected,
            members=members,
            bank_rows=bank_rows,
            gates=gates + residents,
            request_gates=gates,
            mentions=selector_tokens + 4 * residents,
            mention_ids=4 * (selector_tokens + 4 * residents),
            history=history,
            history_rows=min(residents, MOST_HISTORIES) if history else 0,
        )


@dataclass(frozen=True)
class RuleCapacity:
    """How much is reserved for rules.

    Attributes:
        requests: with rules, waiting ones included: seats.
        propositions, conclusions, actions, memories: of one request, over all layers; each a power of two times 64.
        features: latents that one request's propositions look at, at one layer.
        cells: numbers that one request's memories, latches and actions keep.
        rows: entries of each other table, of all requests at one layer.
    """

    requests: int
    propositions: int = 128
    conclusions: int = 128
    actions: int = 128
    memories: int = 256
    features: int = 256
    cells: int = 1024
    rows: int = 8192

    def __post_init__(self) -> None:
        for name, words in zip(("propositions", "conclusions", "actions", "memories"), self.words, strict=True):
            if getattr(self, name) != 64 * words or words & (words - 1):
                raise ValueError(f"{name} is {getattr(self, name)}; expected a power of two times 64")

    @property
    def words(self) -> tuple[int, int, int, int]:
        """64-bit words for the bits of propositions, conclusions, actions, memories, in the order of their place."""
        p, c, a, m = (one // 64 for one in (self.propositions, self.conclusions, self.actions, self.memories))
        return p, c, a, m

    @classmethod
    def of(cls, *, requests: int, propositions: int) -> RuleCapacity:
        """For so many requests with so many propositions at most."""
        words = 1 << max(0, -(-propositions // 64) - 1).bit_length()
        return cls(requests=requests, propositions=64 * words)


@dataclass(frozen=True)
class EncodeCapacity:
    """How much is reserved for whole dictionaries.

    Attributes:
        rows: tokens that are encoded at a time; a multiple of 16.
        takes: latents that all residents take of one SAE at one layer.
        top: largest activations of one token at one layer that are kept for its request's inspections; 0: none may ask.
        programs: of a product: a few per multiprocessor.
    """

    rows: int = 256
    takes: int = 4096
    top: int = 128
    programs: int = 528
