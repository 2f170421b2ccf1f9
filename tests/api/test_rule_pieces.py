"""What is told of rules, without a server: reports from traces, refusals in streams and whole answers, stored rule sets."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from editserver.api.capacity import Capacity
from editserver.api.errors import envelope
from editserver.api.refusal import refusal_choice, refuse_whole, without_end
from editserver.api.rule_report import MOST, RuleReport, opened
from editserver.api.rulesets import shown_normal
from editserver.api.state import EditState
from editserver.catalogue import build_catalogue, open_sae
from editserver.engine.config import EngineConfig
from editserver.library import RulesetLibrary, StoredRuleset, parse_ruleset_body
from editserver.settings import Settings
from interventions.compiled import RuleAction, RuleNames, RuleSetPart
from interventions.errors import InterventionError
from interventions.rules.errors import RuleError
from interventions.rules.machine import RuleTrace
from interventions.rules.reading import parse_ruleset

from .conftest import RELU, make_probes

TEXT = """
proposition a = feature(sae/l1, 1) >= 2
proposition b = 2 * feature(sae/l1, 2) - feature(sae/l1, 3) > 1
rule hop1: a -> danger
rule hop2: danger and seen(b) -> latch worse
on worse: log
on danger: flag
on worse: refuse "No <tool_call>."
"""
N, PROMPT = 8, 5


def made(
    a: set[int], b: set[int], danger: set[int], worse: set[int], cached: int = 0, text: str = TEXT
) -> tuple[RuleReport, RuleTrace]:
    """A request of one rule set, and what an engine would have noted of it at these positions."""

    def bits(*columns: set[int]) -> Any:
        return np.array([[t in column for column in columns] for t in range(N)])

    ruleset = parse_ruleset(text)
    part = RuleSetPart(
        intervention=1,
        ruleset=ruleset,
        digest=ruleset.digest,
        propositions={"a": 1, "b": 0},
        conclusions={"danger": 0, "worse": 1},
        actions=(1, 0, 2),
        given={},
    )
    actions = (
        RuleAction(1, 1, "worse", "log"),
        RuleAction(0, 1, "danger", "flag"),
        RuleAction(2, 1, "worse", "refuse", message="No <tool_call>."),
    )
    held = bits(b, a)
    scores = np.where(held, np.array([4.5, 2.5], np.float32), np.float32(np.nan)).astype(np.float32)
    scores[:cached] = np.nan
    trace = RuleTrace(held, bits(danger, worse), bits(danger, worse, worse), scores)
    names = RuleNames(("b", "a"), ("danger", "worse"), actions, (part,))
    return RuleReport(names, ["0", "guard"], "cmpl-1"), trace


def told(cached: int = 0) -> tuple[RuleReport, RuleTrace]:
    return made({2, 3, 6}, {3}, {2, 3, 6}, {3, 4, 5, 6, 7}, cached)


def advance(report: RuleReport, trace: RuleTrace, stop: int, refused: bool = True) -> list[dict[str, Any]]:
    """The next events, given only the rows that it asks for."""
    first = report.looks_back_to
    parts = (trace.held, trace.concluded, trace.active, trace.scores)
    rows = RuleTrace(*(part[first:] for part in parts))
    return report.advance(rows, stop, PROMPT, lambda: trace, refused=refused, tell=True)


def test_every_firing_is_listed_with_the_chain_of_rules_that_led_to_it() -> None:
    report, trace = told(cached=3)
    entry = report.entry(report.names.sets[0], report.explain(trace, N, PROMPT)[1], trace, N)
    assert [(f["rule"], f["conclusion"], f["position"]) for f in entry["fired"]] == [
        ("hop1", "danger", 2),
        ("hop2", "worse", 3),
        ("hop1", "danger", 6),
    ]
    assert entry["fired_count"] == 3
    premise, evidence = entry["fired"][1]["proof"]["because"]
    assert (premise["rule"], premise["conclusion"], premise["position"]) == ("hop1", "danger", 3)
    assert premise["because"] == [{"evidence": "a", "count": 1, "positions": [3], "scores": {"a": [2.5]}}]
    assert evidence == {"evidence": "seen(b)", "count": 1, "positions": [3], "scores": {"b": [4.5]}}
    readings = {"name": "a", "count": 3, "positions": [2, 3, 6], "scores": [None, 2.5, 2.5]}
    assert entry["propositions"][0] == readings  # position 2 came from the prefix cache: held, score unknown
    assert entry["actions"] == [
        {"on": "worse", "do": "log", "position": 3, "tokens": 5},
        {"on": "danger", "do": "flag", "position": 2, "tokens": 3},
        {"on": "worse", "do": "refuse", "position": 3, "tokens": 5},
    ]
    assert entry["digest"] == parse_ruleset(TEXT).digest
    json.dumps(entry, allow_nan=False)


@pytest.mark.parametrize("steps", [(8,), (5, 6, 7, 8), (1, 2, 3, 4, 5, 6, 7, 8), (3, 3, 8)])
def test_events_are_told_once_and_in_order_however_the_tokens_come(
    steps: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    report, trace = told()
    logged: list[logging.LogRecord] = []
    listener = logging.Handler()
    monkeypatch.setattr(listener, "emit", logged.append)
    logger = logging.getLogger("vllm.editserver.rules")  # its own: vLLM, once imported, sets up the one above it
    for name, value in (("handlers", [listener]), ("propagate", False)):
        monkeypatch.setattr(logger, name, value)
    before = logger.level
    logger.setLevel(logging.INFO)
    try:
        events = [event for stop in steps for event in advance(report, trace, stop)]
    finally:
        logger.setLevel(before)
    assert events == [
        {"id": "guard", "rule": "hop1", "conclusion": "danger", "position": 2},
        {"id": "guard", "action": "flag", "conclusion": "danger", "position": 2},
        {"id": "guard", "rule": "hop2", "conclusion": "worse", "position": 3},
        {"id": "guard", "action": "log", "conclusion": "worse", "position": 3},
        {"id": "guard", "action": "refuse", "conclusion": "worse", "position": 3},
        {"id": "guard", "rule": "hop1", "conclusion": "danger", "position": 6},
        {"id": "guard", "action": "flag", "conclusion": "danger", "position": 6},
    ]
    assert [r.getMessage() for r in logged] == ["request cmpl-1: rules 'guard' concluded worse at position 3"]


def test_what_the_evidence_does_not_explain_fails_the_request() -> None:
    for wrong in (
        made({2, 3, 6}, {3}, {2, 3}, {3, 4, 5, 6, 7}),  # a conclusion that is missing
        made({2, 3, 6}, {3}, {2, 3, 6}, {3, 4, 5, 6}),  # a latch that was forgotten
        made({2}, set(), {2, 4}, set()),  # one out of nowhere
    ):
        with pytest.raises(InterventionError, match="does not add up") as caught:
            wrong[0].explain(wrong[1], N, PROMPT)
        assert (caught.value.code, caught.value.status) == ("intervention_failed", 500)
    report, trace = told()
    trace.active[3, 2] = False
    with pytest.raises(InterventionError, match="an action on 'worse' at position 3"):
        report.explain(trace, N, PROMPT)
    with pytest.raises(InterventionError, match="ends at position 8"):
        advance(*told(), N + 1)
    advance(*told(), 3, refused=False)
    with pytest.raises(InterventionError, match="a refusal at position 3 was not carried out"):
        advance(*told(), 4, refused=False)


def test_a_flapping_conclusion_fills_neither_receipt_nor_stream() -> None:
    n = 4 * MOST
    where = np.arange(n) % 2 == 1
    text = "rule r: feature(s, 1) > 0 -> c\non c: flag\n"
    ruleset = parse_ruleset(text)
    (name,) = ruleset.propositions
    part = RuleSetPart(0, ruleset, ruleset.digest, {name: 0}, {"c": 0}, (0,), {})
    report = RuleReport(RuleNames((name,), ("c",), (RuleAction(0, 0, "c", "flag"),), (part,)), ["0"], "r")
    column = where[:, None]
    trace = RuleTrace(column, column, column, np.ones((n, 1), np.float32))
    assert len([e for stop in range(n + 1) for e in advance(report, trace, stop)]) == 2 * MOST
    entry = report.entry(part, report.explain(trace, n, 4)[0], trace, n)
    assert (len(entry["fired"]), entry["fired_count"]) == (MOST, 2 * MOST)
    assert entry["propositions"][0]["count"] == 2 * MOST
    assert len(entry["propositions"][0]["positions"]) == 32
    assert opened(trace, 0, 6) == {"open_from": 1, "tokens": 3}
    assert opened(trace, 0, 1) == {"open_from": None, "tokens": 0}


# refusals ------------------------------------------------------------------------------------------------------------


def event(**choice: Any) -> str:
    return f"data: {json.dumps({'id': 'x', 'choices': [{'index': 0} | choice]})}\n\n"


def test_a_refused_choice_ends_with_the_message_and_calls_no_tool() -> None:
    assert without_end(event(delta={}, finish_reason="abort", stop_reason=None), {0}) is None
    assert without_end(event(delta={"tool_calls": [{"index": 0}]}, finish_reason="tool_calls"), {0}) is None
    assert without_end(event(text="", finish_reason="abort", logprobs={"tokens": []}), {0}) is None
    role = event(delta={"role": "assistant", "content": ""}, finish_reason=None)
    assert without_end(role, {0}) == role
    left = without_end(event(delta={"content": "late"}, finish_reason="stop", stop_reason=7), {0})
    assert left is not None
    assert json.loads(left.removeprefix("data: "))["choices"] == [
        {"index": 0, "delta": {"content": "late"}, "finish_reason": None}
    ]


def test_other_choices_and_other_events_pass_as_they_are() -> None:
    for passes in (event(index=1, delta={}, finish_reason="stop"), "data: [DONE]\n\n", 'data: {"choices": []}\n\n'):
        assert without_end(passes, {0}) is passes
    ends = event(delta={}, finish_reason="stop")
    assert without_end(ends, set()) is ends


def test_the_last_delta_is_the_message_whatever_it_says() -> None:
    message = '<tool_call>{"name": "x"}</tool_call> data: [DONE]\n\n"'
    chat = refusal_choice("chat.completion.chunk", 2, message)
    assert (chat["index"], chat["delta"], chat["finish_reason"]) == (2, {"content": message}, "content_filter")
    assert refusal_choice("text_completion", 0, message)["text"] == message


def test_a_whole_answer_is_the_message_alone_behind_what_was_echoed() -> None:
    said = SimpleNamespace(content=None, tool_calls=["call"], reasoning="because")
    choice = SimpleNamespace(
        message=said, finish_reason="tool_calls", stop_reason=3, logprobs={"content": []}, token_ids=[1, 2]
    )
    refuse_whole(choice, "No.")
    assert (said.content, said.tool_calls, said.reasoning) == ("No.", [], None)
    assert (choice.finish_reason, choice.stop_reason, choice.logprobs) == ("content_filter", None, None)
    assert choice.token_ids == []
    echoed = SimpleNamespace(text="Prompt", finish_reason="abort", stop_reason=None, logprobs=None, token_ids=None)
    refuse_whole(echoed, " No.")
    assert (echoed.text, echoed.token_ids) == ("Prompt No.", None)


# the library ---------------------------------------------------------------------------------------------------------


def test_a_rule_set_comes_back_as_it_was_written(tmp_path: Path) -> None:
    library = RulesetLibrary(tmp_path)
    written = parse_ruleset_body({"text": TEXT, "description": "guard", "meta": {"by": "hand"}})
    first = library.put("safety", written)
    assert (first.kind, first.version, first.digest) == ("ruleset", 1, written.digest)
    assert RulesetLibrary(tmp_path).get("safety") == written
    assert library.put("safety", parse_ruleset_body(written.body())) == first
    form = parse_ruleset_body({"rules": [{"if": "seen(a)", "then": "b"}], "actions": None})
    assert library.put("safety", form).version == 2
    assert RulesetLibrary(tmp_path).get("safety").source == {"rules": [{"if": "seen(a)", "then": "b"}]}
    with pytest.raises(InterventionError, match="no ruleset 'safty' in the library, which has safety") as caught:
        library.get("safty")
    assert caught.value.code == "unknown_ruleset"
    for damage in (library.encode(StoredRuleset("rule a: b -> c"))["json"], b"{", b"[]"):
        (tmp_path / "rulesets" / "objects" / f"{form.digest}.json").write_bytes(damage)
        with pytest.raises(InterventionError, match="put it again"):
            RulesetLibrary(tmp_path).get("safety")


def test_a_stored_rule_set_that_no_longer_fits_is_shown_with_its_problem(tmp_path: Path) -> None:
    opened = [open_sae(f"{name}={path}") for name, path in make_probes(tmp_path / "probes").items()]
    config = EngineConfig((15, 20), tuple(one.source() for one in opened), ())
    shape = {"d_model": 576, "n_layers": 30, "vocab_size": 10, "tokenizer": None}
    settings = Settings(library=tmp_path)
    catalogue = build_catalogue(config, settings, **shape)
    state = EditState(config, settings, catalogue, Capacity(config.bank_rows), "0", "model", None)
    assert set(catalogue.rule_context().dictionaries or ()) == {RELU}  # the TopK one cannot be read row by row
    hot = f"feature({RELU}, 3) > 1"
    catalogue.rulesets.put("fits", StoredRuleset(f"rule r: {hot} -> a"))
    catalogue.rulesets.put("other", StoredRuleset(f"rule r: {hot} and gone -> a"))
    shown = shown_normal("fits", catalogue.rulesets.get("fits"), state)
    assert shown["normal"]["rules"] == [f"rule r: {hot} -> a"]
    shown = shown_normal("other", catalogue.rulesets.get("other"), state)
    assert shown["normal"] is None
    assert (shown["problem"]["code"], shown["problem"]["column"]) == ("unknown_concept", len(f"rule r: {hot} and ") + 1)


@pytest.mark.parametrize(
    ("raw", "code", "param"),
    [
        ([], "rule_syntax", None),
        ({}, "rule_syntax", None),
        ({"text": "", "rules": []}, "rule_syntax", "text"),
        ({"text": 3}, "rule_syntax", "text"),
        ({"rule": []}, "rule_syntax", "rule"),
        ({"text": "", "description": 3}, "invalid_artifact", "description"),
        ({"text": "", "meta": []}, "invalid_artifact", "meta"),
        ({"text": "", "meta": {"x": "y" * 70_000}}, "invalid_artifact", "meta"),
        ({"text": "\ud800"}, "invalid_artifact", None),
        ({"text": "#" * 1_100_000}, "invalid_artifact", None),
    ],
)
def test_what_is_no_rule_set_is_refused_by_field(raw: Any, code: str, param: str | None) -> None:
    with pytest.raises(InterventionError) as caught:
        parse_ruleset_body(raw)
    assert (caught.value.code, caught.value.param) == (code, param)


def test_an_error_in_a_text_carries_line_and_column() -> None:
    with pytest.raises(RuleError) as caught:
        parse_ruleset("rule a:\n  seen(", param="interventions[0].text")
    told = envelope(caught.value)["error"]
    assert (told["code"], told["param"], told["line"], told["column"]) == (
        "rule_syntax",
        "interventions[0].text",
        2,
        8,
    )
    assert "line" not in envelope(InterventionError("unknown_sae", "x"))["error"]
