"""Every rule set that the docs and the examples show is one, and says what they say it does."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from interventions.rules import build, numbers, proposition, syntax
from interventions.rules.build import Context, Dictionary
from interventions.rules.grammar import KEYWORDS
from interventions.rules.reading import parse_ruleset, parse_when
from interventions.rules.reference import evaluate
from interventions.rules.ruleset import Ruleset
from sae_weights import resolve

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/rules.md").read_text(encoding="utf-8")
EXAMPLES = sorted(path for path in (ROOT / "examples/rules").iterdir() if path.suffix in (".rules", ".json"))
SAE = "smollm2-135m/l15"
CONTEXT = Context({SAE: Dictionary(15, 4608)})


def blocks(kind: str) -> list[str]:
    return re.findall(rf"^```{kind}\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)


def read(path: Path) -> Ruleset:
    text = path.read_text(encoding="utf-8")
    return parse_ruleset(json.loads(text) if path.suffix == ".json" else text, CONTEXT)


@pytest.mark.parametrize("raw", [*blocks("rules"), *map(json.loads, blocks("json"))])
def test_a_rule_set_on_the_page_parses(raw: Any) -> None:
    ruleset = parse_ruleset(raw, CONTEXT)
    assert parse_ruleset(ruleset.text, CONTEXT) == ruleset


def test_the_page_shows_the_forms_that_it_speaks_of() -> None:
    (condition,) = blocks("when")
    assert parse_when(condition, CONTEXT).reads() == ((SAE, 277), (SAE, 617))
    declared = blocks("rules")[0].split("\n\n")[0]
    table = PAGE.split("## Evidence")[1].split("\n\n")[1]
    rows = [row.split("|")[1] for row in table.splitlines()[2:]]
    forms = [form for row in rows for form in re.findall(r"`([^`]+)`", row)]
    assert len(forms) == 9
    for form in (*forms, "≥ 20 % of prompt tokens (ships)", "seen(ships and not countries)"):
        assert parse_ruleset(f"{declared}\nrule: {form} -> x", CONTEXT)
    first = parse_ruleset(blocks("rules")[0], CONTEXT)
    in_json = parse_ruleset(json.loads(blocks("json")[0]), CONTEXT)
    assert {rule.text for rule in first.rules} & {rule.text for rule in in_json.rules} == {
        "rule trip: afloat and prompt(countries) -> latch voyage",
        "rule vessel: prompt(ships) -> afloat",
    }
    with pytest.raises(ValueError, match="a cycle through a negation: calm needs not storm needs calm"):
        parse_ruleset("rule: not storm -> calm rule: calm and feature(s, 1) > 0 -> storm")


def test_the_page_names_the_limits_and_the_words_of_the_language() -> None:
    limits = [
        numbers.MAX_WINDOW,
        numbers.MAX_COUNT,
        proposition.MAX_FEATURES,
        build.MAX_EVIDENCE,
        build.MAX_NODES,
        syntax.MAX_CHARACTERS,
    ]
    for limit in limits:
        assert f"{limit:,}" in PAGE
    assert f"{syntax.MAX_DEPTH} deep" in PAGE
    grammar = blocks("text")[-1]
    words = set(re.findall(r"[a-z_]+", " ".join(re.findall(r'"([^"]+)"', grammar))))
    assert KEYWORDS - {"true", "false", "null"} <= words


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_an_example_parses_and_is_described(path: Path) -> None:
    ruleset = read(path)
    assert ruleset.actions
    assert f"`{path.name}`" in (ROOT / "examples/rules/README.md").read_text(encoding="utf-8")


# on the real model -----------------------------------------------------------------------------------------------------

PROMPTS = {
    "voyage.rules": {
        "Tell me how a boat gets from Spain to Italy.": {"afloat", "voyage"},
        "We left the harbour and the ship sailed to Norway. I was so happy and a little afraid.": {
            "afloat",
            "voyage",
            "moved",
        },
        "How do I get from France to Italy?": set(),
        "How do I fix a leak in my boat?": {"afloat"},
    },
    "homework.rules": {"What is 12 plus 30? And 7 times 8?": {"homework"}, "What is a sum?": set()},
    "consultation.rules": {
        "My doctor listened, and I am so happy that I went, not sad.": {"consultation", "emotional"},
        "I am so happy that I saw my doctor.": set(),
    },
    "topics.json": {
        "A ship, a boat and a sail.": {"topic.ships", "single"},
        "The ship is red and green, the boat is yellow and blue.": {"topic.ships", "topic.colours", "painted"},
    },
}


@pytest.mark.slow
def test_the_examples_conclude_on_the_bundled_model_what_they_are_about() -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from editserver.demo.model import ensure_demo_model

    path = ensure_demo_model()
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(path)
    streams: list[torch.Tensor] = []
    model.model.layers[15].register_forward_hook(lambda *call: streams.append(call[2]))
    sae = resolve(SAE)[1]
    assert set(PROMPTS) == {path.name for path in EXAMPLES}
    for file in EXAMPLES:
        ruleset = read(file)
        for prompt, expected in PROMPTS[file.name].items():
            chat = [{"role": "user", "content": prompt}]
            ids = tokenizer.apply_chat_template(
                chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
            )["input_ids"]
            with torch.no_grad():
                model(ids)
            stream = streams.pop()
            latents = sae.encode((stream[0] if isinstance(stream, tuple) else stream).reshape(-1, sae.d_model))
            readings = {read: latents[:, read[1]].numpy().astype(np.float32) for read in ruleset.reads()}
            steps = evaluate(ruleset, readings, ids.shape[1], ids.shape[1])
            assert set().union(*(step.conclusions for step in steps)) == expected, (file.name, prompt)
