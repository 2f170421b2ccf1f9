"""Candidates for the named features: ``python -m tests.features.pick``; ``named.json`` is chosen from them by hand.

For each topic and dictionary: among features that are rare enough to mean something, those that separate the topic's
``find`` sentences from all other topics' best, and of these those whose promoted tokens become more probable with every
strength at which they are set. Whether it holds on other sentences is for the tests to say.
"""

from __future__ import annotations

from itertools import pairwise

import torch

from interventions.fitting.separation import auroc_columns
from sae_weights.catalogue import BUNDLED_FOLDER, resolve
from sae_weights.knowledge.store import FILE, KnowledgeStore
from tests.features import measure

CANDIDATES = 8
DENSEST = 0.03


def main() -> None:
    names = list(measure.TOPICS)
    texts = [s for name in names for s in measure.TOPICS[name]["find"]]
    of = torch.tensor([names.index(name) for name in names for _ in measure.TOPICS[name]["find"]])
    h = measure.residuals(texts)
    for layer in measure.LAYERS:
        sae_id = f"smollm2-135m/l{layer}"
        _, sae = resolve(sae_id)
        store = KnowledgeStore.open(BUNDLED_FOLDER / sae_id / FILE, sae_digest=sae.digest)
        activations = measure.pooled(sae, h[layer])
        density = torch.tensor(sae.metadata["density"])
        for number, topic in enumerate(names):
            positive, negative = activations[of == number], activations[of != number]
            area = torch.from_numpy(auroc_columns(positive.numpy(), negative.numpy())[0])
            gap = positive.mean(0) - negative.mean(0)
            score = torch.where((area >= 0.95) & (density < DENSEST), gap.double(), -1.0)
            for feature in score.topk(CANDIDATES).indices.tolist():
                if score[feature] <= 0:
                    break
                known = store.feature(feature)
                ids = measure.promoted_ids(known.promoted)
                if len(ids) < 5:
                    continue
                rise = measure.next_token_probability(
                    sae, feature, ids, [s * known.max_activation for s in measure.STRENGTHS]
                )
                if all(a < b for a, b in pairwise(rise)) and rise[-1] > 2 * rise[0]:
                    shown = " ".join(f"{p:.5f}" for p in rise)
                    words = [token for token, _ in known.promoted[:6]]
                    print(sae_id, topic, feature, f"{area[feature]:.2f}", shown, known.label, words)


if __name__ == "__main__":
    main()
