"""Requests for the tiny model, one of every machinery, and what ``transformers`` with the pure functions makes of them.

For starts in processes of their own (:mod:`tests.engine.engine_process`): the requests are compiled here.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from editserver.catalogue import OpenedSAE, build_catalogue
from editserver.engine.config import EngineConfig
from editserver.settings import Settings
from interventions.compile import Compiled, compile_request
from interventions.maps.gates import CusumGate, statistic
from interventions.maps.map import AllTokens, LatentMap, SequenceGate
from interventions.maps.transfer import interpolate
from interventions.reference import ReferenceExecutor
from interventions.spec import parse_inspect, parse_interventions
from sae_weights import load_sae
from tests.engine.dictionaries import write_native
from tests.engine.engine_process import Answered, Asked
from tests.engine.rule_checks import threshold
from tests.engine.tiny import D_MODEL, N_LAYERS, VOCAB

ARMED = (1, 2)
N_NEW = 4
LOGPROB_TOLERANCE = 1e-3
Json = dict[str, Any]


def prompt_of(seed: int, length: int = 40) -> list[int]:
    """Random tokens behind a first one."""
    return [1, *torch.randint(3, VOCAB, (length - 1,), generator=torch.Generator().manual_seed(seed)).tolist()]


@dataclass(frozen=True)
class Made:
    """A request: how it is sent, and what it says."""

    asked: Asked
    compiled: Compiled


class Bench:
    """Dictionaries and a catalogue for a model of the tiny one's shape, and a reference that runs it."""

    def __init__(self, model: Any, folder: Path) -> None:
        """``model`` is a ``transformers`` model; files are made in ``folder``."""
        saes = {
            f"{name}/l{layer}": load_sae(write_native(folder / f"{name}{layer}", layer, name, D_MODEL, encoder=1.0))
            for name, layer in (("jumprelu", 1), ("topk", 1), ("jumprelu", 2))
        }
        sources = tuple(OpenedSAE(name, sae.hook.layer, sae).source() for name, sae in saes.items())
        self.config = EngineConfig(ARMED, sources, tuple(saes), bank_rows=512)
        self.catalogue = build_catalogue(
            self.config,
            Settings(library=folder / "library"),
            d_model=D_MODEL,
            n_layers=N_LAYERS,
            vocab_size=VOCAB,
            tokenizer=None,
        )
        self.saes = saes
        self.reference = ReferenceExecutor(model, {sae.digest: sae for sae in saes.values()})

    @classmethod
    def of(cls, model: Path, folder: Path) -> Bench:
        """Of the checkpoint in ``model``, in float32."""
        from transformers import AutoModelForCausalLM

        return cls(AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32), folder)

    def activations(self, prompt: Sequence[int], sae: str) -> np.ndarray:
        """float32 ``[tokens, latents]`` of the unedited model."""
        layer = self.saes[sae].hook.layer
        with torch.no_grad():
            streams = self.reference.model.model(torch.tensor([list(prompt)]), output_hidden_states=True).hidden_states
            found: np.ndarray = self.saes[sae].encode(streams[layer + 1][0].float()).numpy()
        return found

    def make(self, prompt: Sequence[int], edits: Sequence[Json] = (), inspect: Any = None, **asked: Any) -> Made:
        """The request as the API would compile it."""
        parsed = parse_interventions(list(edits)), parse_inspect(inspect)
        compiled = compile_request(*parsed, self.catalogue).resolved(prompt)
        payload = compiled.payload()
        carries = payload.program is not None or payload.reads
        return Made(Asked(list(prompt), payload.to_bytes() if carries else None, N_NEW, **asked), compiled)

    def cases(self, **asked: Any) -> dict[str, Made]:
        """One request of every machinery, each on a prompt of its own."""
        made = {"plain": self.make(prompt_of(0), **asked), "steer": self.make(prompt_of(1), [STEER], **asked)}
        scales = [{"index": i, "op": "scale", "value": 0.0 if i % 2 else 3.0} for i in range(60)]
        made["thresholds"] = self.make(prompt_of(2), [features("jumprelu/l1", scales)], **asked)
        topk = [{"index": i, "op": "set", "value": 25.0} for i in (3, 50)]
        made["topk"] = self.make(prompt_of(3), [features("topk/l1", topk)], **asked)
        made["rules"] = self.make(prompt_of(4), [{"type": "rules", "text": self._rules(prompt_of(4))}], **asked)
        made["gate"] = self.make(prompt_of(5), [self._gated(prompt_of(5))], **asked)
        reads = [{"sae": "jumprelu/l1", "features": [0, 1, 2]}, {"sae": "topk/l1", "top_k": 3}]
        made["inspect"] = self.make(prompt_of(6), [STEER], reads, **asked)
        return made

    def _rules(self, prompt: Sequence[int]) -> str:
        """A count over the sequence at layer 1, with an effect at layer 2 behind it; one token's latent, flagged."""
        acts = self.activations(prompt, "jumprelu/l1")[1:]
        a, b = acts.std(axis=0).argsort()[::-1][:2].tolist()
        effect = json.dumps(features("jumprelu/l2", [{"index": 5, "op": "set", "value": 40.0}]))
        return "\n".join(
            [
                f"proposition a = feature(jumprelu/l1, {a}) > {threshold(acts[:, a], 0.5)!r}",
                f"proposition b = feature(jumprelu/l1, {b}) > {threshold(acts[:, b], 0.4)!r}",
                "rule: at least 5 of seen(a) -> latch many",
                "rule: many and b -> both",
                f"on many: do {effect}",
                "on both: flag",
            ]
        )

    def _gated(self, prompt: Sequence[int]) -> Json:
        """A remap behind a gate that opens in the middle of the prompt and stays open."""
        bits = self.activations(prompt, "jumprelu/l1") != 0
        evidence = int(np.abs(bits[1:].mean(axis=0) - 0.6).argmin())
        highest = statistic(CusumGate(0.0, 0.125, latch=True), bits[:, evidence])
        gate = SequenceGate(CusumGate(0.6 * highest, 0.125, latch=True), (evidence,))
        targets = tuple(interpolate(i, 25.0) for i in range(70, 76) if i != evidence)
        sae = self.saes["jumprelu/l1"]
        found = LatentMap("demo", sae.digest, sae.hook.layer, targets, AllTokens(), gate)
        self.catalogue.maps.put(found.digest[:20], found)
        return {"type": "remap", "map": found.digest[:20]}

    def assert_answered(self, made: Made, answered: Answered, name: str) -> None:
        """Tokens, log-probabilities, receipts, readings and decisions are the reference's."""
        payload = made.compiled.payload()
        n, n_new = len(made.asked.prompt), made.asked.max_tokens
        expected = self.reference.generate(made.asked.prompt, payload, max_tokens=n_new)
        assert answered.tokens == expected.token_ids, name
        for step, top in zip(expected.logprobs, answered.top, strict=True):
            assert max(abs(float(step[token]) - value) for token, value in top.items()) < LOGPROB_TOLERANCE, name
        program, journal = payload.program, answered.journal
        if made.asked.payload is None:
            assert journal is None
            return
        n_fed = n + n_new - 1
        assert journal.covers(journal.computed_from, n_fed), name
        for at in program.layers if program else ():
            for entry in range(len(made.compiled.entries)):
                mine, theirs = journal.stats(entry, at.layer, n_fed), expected.forward.stats(entry, at.layer)
                assert (mine.fired, mine.clamped) == (theirs.fired, theirs.clamped), (name, at.layer)
                assert abs(mine.dose_mean - theirs.dose_mean) < 1e-4, name
            for number, gate in enumerate(at.gates):
                if gate.over_sequence:
                    facts = expected.forward.gates[at.layer][number]
                    assert facts.open_from is not None
                    assert journal.gate(at.layer, number) == (facts.open_from, facts.statistic), name
        if expected.forward.rules is not None:
            for bits in ("held", "concluded", "active"):
                assert np.array_equal(getattr(journal.rules, bits), getattr(expected.forward.rules, bits)), (name, bits)
            assert journal.rules.active.any()
        for number in range(len(payload.reads)):
            mine = journal.readings(number, 0, n_fed)
            assert len(mine) == n_fed - 1
            for (at, pairs), (there, due) in zip(mine, expected.forward.readings[number], strict=True):
                assert (at, [i for i, _ in pairs]) == (there, [i for i, _ in due]), name
                assert np.allclose([v for _, v in pairs], [v for _, v in due], atol=1e-3), name


STEER: Json = {"type": "steer", "sae": "jumprelu/l2", "feature": 3, "strength": 30.0}


def features(sae: str, ops: Sequence[Json]) -> Json:
    """An edit of latents."""
    return {"type": "edit_features", "sae": sae, "features": list(ops)}
