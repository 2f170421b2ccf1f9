"""One edited (or inspected) request, from its validated fields to the receipts of its choices."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from editserver import metrics
from editserver.api.readings import inspection, reading
from editserver.api.receipts import build_receipt
from editserver.api.refusal import refuse_whole
from editserver.api.rule_report import RuleReport, Trace, disagreement
from editserver.api.state import EditState
from editserver.engine.journal import Journal
from editserver.engine.wire import KEY
from interventions.compile import Compiled, check_selectable
from interventions.errors import InterventionError


class Choice:
    """One output sequence as far as it was delivered; ``compiled`` is what its prompt made of the request."""

    def __init__(self, index: int, prompt: Sequence[int], compiled: Compiled) -> None:
        self.index = index
        self.prompt = prompt
        self.compiled = compiled
        self.output: list[int] = []
        self.journal: Journal | None = None
        self.cached: int | None = None
        self.read_to = 0
        self.report: RuleReport | None = None
        self.refused_at: int | None = None
        self.message = ""

    @property
    def fed(self) -> int:
        """How many tokens count: those that were fed to the model (the prompt and all sampled tokens but the last).

        Where a rule refused, those up to the one at which it did, however many more were computed along with it.
        """
        if self.refused_at is not None:
            return self.refused_at + 1
        return len(self.prompt) + max(0, len(self.output) - 1)

    @property
    def tokens(self) -> list[int]:
        """Their ids; without that of a sampled token at which a rule refused, which is withheld."""
        return [*self.prompt, *self.output][: self.fed]

    @property
    def computed_from(self) -> int:
        """First position that this request computed itself."""
        return self.journal.computed_from if self.journal is not None else self.cached or 0

    def refuse(self) -> None:
        """Note that a rule ended the choice, and with which words."""
        assert self.journal is not None
        assert self.journal.refusal is not None
        names, trace = self.compiled.rules, self.journal.rules
        _, position = self.journal.refusal
        action = None if names is None or trace is None else names.refusal(trace.active[position])
        if action is None:
            raise disagreement(f"a refusal at position {position}")
        phase = "prompt" if position < len(self.prompt) else "generated"
        metrics.RULE_REFUSALS.labels(phase).inc()
        self.refused_at, self.message = position, action.message

    def check(self) -> None:
        """Raise unless the engine vouches for every position that it computed for the delivered tokens."""
        if self.journal is None:
            raise failed("the engine returned an output without its record of edits")
        if self.journal.error is not None:
            raise self.journal.error
        first = self.journal.computed_from
        latest_start = len(self.prompt) - 1 if self.cached is None else min(self.cached, len(self.prompt) - 1)
        if first > latest_start or not self.journal.covers(first, self.fed):
            raise failed(f"the engine's record of edits has gaps below position {self.fed}")


def failed(message: str) -> InterventionError:
    """``intervention_failed``: found out too late to refuse, so the request fails rather than pass unedited."""
    return InterventionError("intervention_failed", f"{message}; the request was stopped", None)


def _trace(journal: Journal) -> Trace:
    trace = journal.rules
    assert trace is not None
    return trace


@dataclass
class Edit:
    """The edits and inspections of one HTTP request, shared by all its choices.

    Attributes:
        compiled: what the fields mean, whatever the prompt.
        inspect_as_list: whether ``inspect`` was a list (``inspection`` mirrors it).
    """

    state: EditState
    compiled: Compiled
    inspect_as_list: bool
    prompts: list[Sequence[int]] = field(default_factory=list)
    choices: dict[int, Choice] = field(default_factory=dict)
    _resolved: list[Compiled] = field(default_factory=list)
    _admitted: int = 0

    @classmethod
    def prepare(cls, state: EditState, interventions: Any, inspect: Any, releases: list[Callable[[], None]]) -> Edit:
        """Validate, resolve and compile; reserve bank rows until ``releases`` are run.

        Raises:
            InterventionError: with the contract's codes.
        """
        compiled, types = state.compiled(interventions, inspect)
        releases.append(state.capacity.reserve(compiled.row_keys))
        for kind in types | ({"inspect"} if compiled.reads else set()):
            metrics.REQUESTS.labels(kind).inc()
        return cls(state, compiled, isinstance(inspect, list))

    @property
    def travels(self) -> bool:
        """Whether the engine has anything to do: all no-ops and no inspection leave a plain request."""
        return self.compiled.program is not None or bool(self.compiled.reads)

    # before generation -----------------------------------------------------------------------------------------------

    def set_prompts(self, prompts: Sequence[Sequence[int] | None]) -> None:
        """Token ids of the prompts, in order, as rendered."""
        if any(prompt is None for prompt in prompts):
            message = "prompt embeddings cannot be combined with interventions or inspect: their tokens are unknown"
            raise InterventionError("unsupported_with_interventions", message, "prompt_embeds")
        self.prompts = [prompt for prompt in prompts if prompt is not None]
        self._resolved = [self.compiled.resolved(prompt) for prompt in self.prompts]

    def admit(self, params: Any) -> None:
        """Put the payload into the sampling parameters of the next prompt, once its selectors are known to select."""
        prompt, compiled = self.prompts[self._admitted], self._resolved[self._admitted]
        self._admitted += 1
        if not self.travels:
            return
        check_selectable(compiled, prompt, params.max_tokens)
        if compiled is not self.compiled:
            self.state.check(compiled)  # as many ranges as the prompt has mentions
        params.extra_args = {**(params.extra_args or {}), KEY: compiled.encoded}
        if self.compiled.inspects_prompt:
            params.skip_reading_prefix_cache = True

    # while outputs come ----------------------------------------------------------------------------------------------

    def observe(self, prompt_index: int, result: Any, n: int, delta: bool) -> list[Choice]:
        """Note one ``RequestOutput`` of prompt ``prompt_index``; the choices it brought.

        Raises:
            InterventionError: the engine refused (dose) or cannot vouch for what it did.
        """
        seen: list[Choice] = []
        for output in result.outputs:
            index = output.index + prompt_index * n
            choice = self.choices.get(index)
            if choice is None:
                prompt, compiled = self.prompts[prompt_index], self._resolved[prompt_index]
                choice = self.choices[index] = Choice(index, prompt, compiled)
            if result.prompt_token_ids is not None:
                choice.prompt = result.prompt_token_ids
            # With several sequences per prompt, vLLM reports the cached tokens of one of them only.
            choice.cached = result.num_cached_tokens if n == 1 else None
            if not delta:
                choice.output.clear()
            choice.output.extend(output.token_ids)
            choice.journal = getattr(output, KEY, None)
            if self.travels:
                if choice.journal is not None and choice.journal.error is not None:
                    raise choice.journal.error
                if output.finish_reason == "error":
                    raise failed("the engine failed while it ran this request")
                self._follow_rules(choice, result, output, delta)
                choice.check()
            seen.append(choice)
        return seen

    def _follow_rules(self, choice: Choice, result: Any, output: Any, delta: bool) -> None:
        """Before vLLM makes text of ``output``: see whether a rule refused it, and blank what is not to be read."""
        if choice.compiled.rules is None or choice.journal is None:
            return
        if choice.report is None:
            ids = [entry.id for entry in choice.compiled.entries]
            choice.report = RuleReport(choice.compiled.rules, ids, result.request_id)
        if output.finish_reason is not None and choice.refused_at is None and choice.journal.refusal is not None:
            choice.refuse()
        if choice.refused_at is None:
            return
        if not delta:
            output.text = ""  # the answer is the message alone, whatever a tool or reasoning parser would make of it
        if result.prompt_logprobs is not None:  # a prompt that was refused may not have been read to its end
            missing = len(choice.prompt) - len(result.prompt_logprobs)
            result.prompt_logprobs = [*result.prompt_logprobs, *([None] * missing)]

    async def watch(
        self, results: AsyncIterator[Any], n: int, delta: bool, tell: Callable[[list[Choice]], None] | None = None
    ) -> AsyncIterator[Any]:
        """Pass the engine's outputs on after :meth:`observe`; an error closes ``results``, which aborts the request.

        ``results`` yields ``RequestOutput`` or, for several prompts, ``(prompt index, RequestOutput)``.
        """
        async with aclosing(results) as closing:  # type: ignore[type-var]
            async for item in closing:
                prompt_index, result = item if isinstance(item, tuple) else (0, item)
                choices = self.observe(prompt_index, result, n, delta)
                if tell is not None:
                    tell(choices)
                yield item

    # afterwards ------------------------------------------------------------------------------------------------------

    def new_readings(self, choice: Choice) -> Any | None:
        """Readings of ``choice`` since the last call, in the form of ``inspection``; None if there are none."""
        if not self.compiled.reads or choice.journal is None:
            return None
        stop = min(choice.fed, len(choice.prompt) + len(choice.output))
        start, choice.read_to = choice.read_to, stop
        found = [
            [reading(self.state, sae, choice, position, features) for position, features in journal]
            for sae, journal in zip(
                self.compiled.inspect_ids,
                (choice.journal.readings(r, start, stop) for r in range(len(self.compiled.reads))),
                strict=True,
            )
        ]
        rows = None if choice.report is None else choice.journal.rules_from(start)
        if choice.report is not None and rows is not None:
            for token in (token for tokens in found for token in tokens):
                token["rules"] = choice.report.at(rows, token["position"] - start)
        return inspection(self.compiled, found, self.inspect_as_list) if any(found) else None

    def new_events(self, choice: Choice, *, tell: bool = True) -> list[dict[str, Any]]:
        """What the rules of ``choice`` did since the last call; logged and counted, whether it is told or not."""
        report, journal = choice.report, choice.journal
        rows = None if report is None or journal is None else journal.rules_from(report.looks_back_to)
        if report is None or journal is None or rows is None:
            return []
        refused = choice.refused_at is not None
        return report.advance(rows, choice.fed, len(choice.prompt), lambda: _trace(journal), refused=refused, tell=tell)

    def parts(self, choice: Choice) -> dict[str, Any]:
        """What a whole (not streamed) answer carries for ``choice``: ``interventions`` and ``inspection``."""
        parts: dict[str, Any] = {}
        if self.compiled.entries:
            parts["interventions"] = self.receipt(choice)
        if self.compiled.reads:
            none: list[list[dict[str, Any]]] = [[] for _ in self.compiled.reads]
            parts["inspection"] = self.new_readings(choice) or inspection(self.compiled, none, self.inspect_as_list)
        return parts

    def receipt(self, choice: Choice) -> dict[str, Any]:
        """The receipt of ``choice``.

        Raises:
            InterventionError: ``intervention_failed``: what the engine says its rules did does not follow from its evidence.
        """
        self.new_events(choice, tell=False)
        return build_receipt(
            choice.compiled,
            choice.journal,
            choice.tokens,
            len(choice.prompt),
            choice.computed_from,
            stop=choice.fed,
            report=choice.report,
        )

    def attach(self, response: Any) -> None:
        """Put every choice's parts into a whole response: at top level for one choice, else inside each.

        What a rule refused becomes its message.
        """
        choices = [self.choices[index] for index in sorted(self.choices)]
        for choice, out in zip(choices, response.choices, strict=True):
            if choice.refused_at is not None:
                refuse_whole(out, choice.message)
        if len(choices) == 1:
            _set(response, self.parts(choices[0]))
            return
        for choice, out in zip(choices, response.choices, strict=True):
            _set(out, self.parts(choice))


def _set(target: Any, parts: dict[str, Any]) -> None:
    for name, value in parts.items():
        setattr(target, name, value)
