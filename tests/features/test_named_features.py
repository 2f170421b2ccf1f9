"""Named features mean what their name says, in both directions: what makes them fire, and what setting them does."""

from __future__ import annotations

import json

import pytest

from interventions.fitting.separation import auroc
from sae_weights.catalogue import BUNDLED_FOLDER, resolve
from sae_weights.knowledge.store import FILE, KnowledgeStore
from tests.features import measure

NAMED = json.loads((measure.FOLDER / "named.json").read_text())
IDS = [f"{n['sae']}-{n['index']}-{n['topic']}" for n in NAMED]


@pytest.fixture(scope="module")
def saes():
    return {name: resolve(name)[1] for name in {n["sae"] for n in NAMED}}


@pytest.fixture(scope="module")
def stores(saes):
    return {
        name: KnowledgeStore.open(BUNDLED_FOLDER / name / FILE, sae_digest=sae.digest) for name, sae in saes.items()
    }


@pytest.fixture(scope="module")
def checked(saes):
    """Per SAE: topic → activations of the sentences that no feature was chosen on, pooled per sentence."""
    texts = [(topic, s) for topic, sides in measure.TOPICS.items() for s in sides["check"]]
    h = measure.residuals([s for _, s in texts])
    found = {}
    for name, sae in saes.items():
        pooled = measure.pooled(sae, h[sae.hook.edit_layer])
        found[name] = {topic: pooled[[i for i, (t, _) in enumerate(texts) if t == topic]] for topic in measure.TOPICS}
    return found


def test_there_are_at_least_twenty_over_all_three_dictionaries():
    assert len({(n["sae"], n["index"]) for n in NAMED}) >= 20
    assert {n["sae"] for n in NAMED} == {f"smollm2-135m/l{layer}" for layer in measure.LAYERS}


def test_no_sentence_serves_both_to_choose_and_to_judge():
    for sides in measure.TOPICS.values():
        assert not set(sides["find"]) & set(sides["check"])


@pytest.mark.parametrize("named", NAMED, ids=IDS)
def test_its_texts_activate_it_above_unrelated_ones(named, checked):
    of = checked[named["sae"]]
    own = of[named["topic"]][:, named["index"]]
    others = [float(v) for topic, rows in of.items() if topic != named["topic"] for v in rows[:, named["index"]]]
    assert auroc(own.numpy(), others).value >= 0.9


@pytest.mark.parametrize("named", NAMED, ids=IDS)
def test_setting_it_raises_its_promoted_tokens_monotonically(named, saes, stores):
    sae, known = saes[named["sae"]], stores[named["sae"]].feature(named["index"])
    values = [s * known.max_activation for s in measure.STRENGTHS]
    rise = measure.next_token_probability(sae, named["index"], measure.promoted_ids(known.promoted), values)
    assert rise == sorted(rise)
    assert len(set(rise)) == len(rise)
    assert rise[-1] > 2 * rise[0]


@pytest.mark.parametrize("name", sorted({n["sae"] for n in NAMED}))
def test_search_finds_a_named_feature_by_its_label(name, stores):
    store = stores[name]
    for named in (n for n in NAMED if n["sae"] == name):
        label = store.feature(named["index"]).label
        assert label
        assert named["index"] in [found.index for found in store.search(label, 10)]
