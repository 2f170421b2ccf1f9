"""What ships with the bundled dictionaries: it is theirs, it is complete, it is small, and its contexts are true."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from editserver.demo.model import ensure_demo_model
from sae_weights import SAE, bundled, resolve
from sae_weights.catalogue import BUNDLED_FOLDER
from sae_weights.knowledge import FILE, KnowledgeStore
from sae_weights.knowledge.forward import ResidualReader

MEGABYTES = 4.2
"""Three of them and the weights stay below 45 MiB."""


@pytest.fixture(scope="module", params=bundled())
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def sae(name: str) -> SAE:
    return resolve(name)[1]


@pytest.fixture(scope="module")
def store(name: str, sae: SAE) -> Iterator[KnowledgeStore]:
    with KnowledgeStore.open(BUNDLED_FOLDER / name / FILE, sae_digest=sae.digest) as opened:
        yield opened


@cache
def demo() -> tuple[Any, Any]:
    path = ensure_demo_model(progress=False)
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16).eval(), AutoTokenizer.from_pretrained(path)


def test_it_is_small_and_says_what_it_was_made_from(name: str, store: KnowledgeStore) -> None:
    assert (BUNDLED_FOLDER / name / FILE).stat().st_size <= MEGABYTES * 1e6
    assert store.meta["tokens"] >= 300_000
    assert set(store.meta["tokens_by_source"]) == {source["name"] for source in store.meta["sources"]}
    assert all(source["licence"] for source in store.meta["sources"])


def test_nearly_every_feature_has_everything(store: KnowledgeStore, sae: SAE) -> None:
    features = [store.feature(index) for index in range(sae.n_features)]
    fired = [f for f in features if f.density]
    assert len(fired) >= 0.99 * len(features)
    assert sum(f.label is not None for f in fired) >= 0.99 * len(fired)
    assert all(len(f.promoted) >= 5 and len(f.suppressed) >= 5 and len(f.neighbours) == 5 for f in features)
    assert sum(len(f.contexts) >= 6 for f in fired) >= 0.95 * len(fired)
    for feature in fired:
        assert feature.mean_activation is not None
        assert feature.max_activation is not None
        assert feature.quantiles["0.5"] <= feature.quantiles["0.99"] * 1.0001 <= feature.max_activation * 1.03
        assert len(set(feature.contexts)) == len(feature.contexts)


def test_a_context_makes_its_feature_fire_again(store: KnowledgeStore, sae: SAE) -> None:
    """The model reads the context alone, so the activation is another one; at the peak there should be one all the same."""
    model, tokenizer = demo()
    assert sae.hook.edit_layer is not None
    fired = total = 0
    with ResidualReader(model, [sae.hook.edit_layer]) as reader:
        for index in range(3, sae.n_features, sae.n_features // 40):
            for context in store.feature(index).contexts[:2]:
                before = tokenizer("".join(context.tokens[: context.peak]), add_special_tokens=False).input_ids
                ids = tokenizer("".join(context.tokens[: context.peak + 1]), add_special_tokens=False).input_ids
                if ids[:-1] != before or len(ids) < 6:
                    continue  # the text alone does not give these tokens back, or it starts too near to the sink
                total += 1
                h = reader([ids])[sae.hook.edit_layer][-1:]
                fired += int(float(sae.encode(h)[0, index]) > 0)
    assert total >= 40
    assert fired >= 0.85 * total


@pytest.mark.parametrize(
    ("query", "words"),
    [
        ("music", {"music", "song", "violin", "orchestra", "melody", "band"}),
        ("food", {"food", "meat", "cheese", "bread", "soup"}),
        ("war", {"war", "army", "military", "troops", "soldier"}),
        ("water", {"water", "sea", "river"}),
        ("number", {"number", "numbers"}),
        ("function", {"function", "def"}),
    ],
)
def test_search_finds_features_that_fire_on_what_was_asked_for(
    store: KnowledgeStore, query: str, words: set[str]
) -> None:
    found = store.search(query, 5)
    assert found
    for hit in found[:3]:
        feature = store.feature(hit.index)
        said = {w.lower() for w in (*feature.words, *feature.topics, *(feature.label or "").replace(":", " ").split())}
        said = {w.strip('",') for w in said}
        assert said & words or any(w.startswith(query) for w in said), (hit.index, feature.label, feature.words)
