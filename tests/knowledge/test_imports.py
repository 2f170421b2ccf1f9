"""Published explanations: files in Neuronpedia's and delphi's layout, and files that only look so."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from sae_weights import SAE, Hook
from sae_weights.knowledge import Context, Feature, KnowledgeError, KnowledgeStore, delphi, imports, neuronpedia
from sae_weights.knowledge.imports import write

N = 64
WHERE = {"modelId": "gemma-2-2b", "layer": "20-gemmascope-res-16k"}


def make_sae(hook: Hook = Hook("resid_post", 20), **metadata: object) -> SAE:  # noqa: B008
    rows = torch.randn(N, 4, generator=torch.Generator().manual_seed(0))
    return SAE.from_tensors(
        architecture="relu",
        hook=hook,
        W_enc=rows,
        W_dec=rows,
        b_dec=torch.zeros(4),
        gate={"b_enc": torch.zeros(N)},
        metadata=metadata,
    )


def explanation(index: object, description: object, **more: object) -> dict[str, Any]:
    """A row of Neuronpedia's table Explanation, with the columns that its export writes."""
    return {
        "id": "clx0" + str(index),
        **WHERE,
        "index": index,
        "authorId": "clkht01d40000jv08hvalcvly",
        "description": description,
        "embedding": "[0.01,-0.02]",
        "typeName": "oai_token-act-pair",
        "explanationModelName": "gpt-4o-mini",
        "umap_x": 0,
        "umap_y": 0,
        "umap_cluster": 0,
        "umap_log_feature_sparsity": 0,
    } | more


def feature(index: str) -> dict[str, Any]:
    """A row of Neuronpedia's table Neuron (columns that matter, and some that do not)."""
    return {
        **WHERE,
        "index": index,
        "maxActApprox": 62.5,
        "frac_nonzero": 0.0021,
        "freq_hist_data_bar_heights": [1, 2],
        "neg_str": ["▁not", "x"],
        "neg_values": [-0.5, -0.25],
        "pos_str": ["▁Paris", "▁France"],
        "pos_values": [1.25, 1.0],
        "topkCosSimIndices": [int(index), 3, 5],
        "topkCosSimValues": [1.0, 0.5, 0.25],
        "vector": [],
        "hookName": "blocks.20.hook_resid_post",
    }


def activation(index: str, peak: float, tokens: int = 40) -> dict[str, Any]:
    values = [0.0] * tokens
    values[20] = peak
    return {
        "id": "x", **WHERE, "index": index, "tokens": [f"▁t{i}" for i in range(tokens)], "values": values,
        "maxValue": peak, "maxValueTokenIndex": 20,
    }  # fmt: skip


def jsonl(path: Path, *rows: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


@pytest.fixture
def export(tmp_path: Path) -> Path:
    folder = tmp_path / "v1" / "gemma-2-2b" / "20-gemmascope-res-16k"
    jsonl(folder / "explanations" / "batch-0.jsonl.gz", explanation("7", "French cities"), explanation("8", " wars "))
    jsonl(folder / "explanations" / "batch-1.jsonl.gz", explanation("60", "numbers"))
    jsonl(folder / "features" / "batch-0.jsonl.gz", feature("7"))
    jsonl(folder / "activations" / "batch-0.jsonl", *(activation("7", float(p)) for p in range(1, 13)))
    jsonl(folder / "model.jsonl", {"id": "gemma-2-2b"})
    return folder


def test_a_neuronpedia_export_becomes_a_store(export: Path, tmp_path: Path) -> None:
    sae = make_sae()
    assert neuronpedia.looks_like(export)
    assert not delphi.looks_like(export)
    assert write(neuronpedia.read(export, sae), sae, tmp_path / "features.sqlite") == 3
    with KnowledgeStore.open(tmp_path / "features.sqlite", sae_digest=sae.digest) as store:
        assert store.labels() == {7: "French cities", 8: "wars", 60: "numbers"}
        known = store.feature(7)
        assert (known.label_source, known.density, known.max_activation) == (
            "neuronpedia:oai_token-act-pair",
            0.0021,
            62.5,
        )
        assert known.promoted == ((" Paris", 1.25), (" France", 1.0))
        assert known.suppressed == ((" not", -0.5), ("x", -0.25))
        assert known.neighbours == ((3, 0.5), (5, 0.25))
        assert [c.activations[c.peak] for c in known.contexts] == [12, 11, 10, 9, 8, 7, 6, 5]
        assert known.contexts[0].tokens[known.contexts[0].peak] == " t20"
        assert len(known.contexts[0].tokens) == 16
        assert [hit.index for hit in store.search("french city", 5)] == [7]
        assert store.meta["imports"] == [{"format": "neuronpedia", "explanations": 3, "features": 3}]


@pytest.mark.parametrize("name", ["batch-0.jsonl", "batch-0.jsonl.gz", "anything.jsonl"])
def test_a_single_file_is_enough(tmp_path: Path, name: str) -> None:
    path = jsonl(tmp_path / name, explanation("3", "a label"), "")
    assert neuronpedia.read(path, make_sae()).explanations[3].text == "a label"


def test_what_the_api_returns_is_read_too(tmp_path: Path) -> None:
    several = [explanation("1", "one"), explanation(2, "two")]
    of_feature = {
        **WHERE,
        "index": "4",
        "maxActApprox": 2.0,
        "explanations": [{"description": "four", "typeName": "np_max-act"}],
    }
    for number, (content, expected) in enumerate(
        [
            (several, {1: "one", 2: "two"}),
            (of_feature, {4: "four"}),
            ([of_feature, *several], {1: "one", 2: "two", 4: "four"}),
        ]
    ):
        path = tmp_path / f"{number}.json"
        path.write_text(json.dumps(content))
        found = neuronpedia.read(path, make_sae())
        assert {i: e.text for i, e in found.explanations.items()} == expected
    assert found.facts[4].max_activation == 2.0
    assert found.explanations[4].source == "neuronpedia:np_max-act"


def test_of_several_explanations_the_best_scored_wins_then_the_newest_then_the_last(tmp_path: Path) -> None:
    scored = {"scores": [{"value": 0.7}, {"value": 0.9}]}
    rows = [
        explanation("1", "low", scores=[{"value": 0.2}], createdAt="2025-03-01"),
        explanation("1", "best", **scored),
        explanation("1", "unscored", createdAt="2026-01-01"),
        explanation("2", "newer", createdAt="2025-02-01T10:00:00Z"),
        explanation("2", "older", createdAt="2024-02-01T10:00:00Z"),
        explanation("3", "first"),
        explanation("3", "last"),
    ]
    found = neuronpedia.read(jsonl(tmp_path / "a.jsonl", *rows), make_sae())
    assert {i: e.text for i, e in found.explanations.items()} == {1: "best", 2: "newer", 3: "last"}
    assert (found.read, found.explanations[1].score) == (7, pytest.approx(0.8))


def test_imported_labels_replace_automatic_ones_only_and_what_was_measured_stays(export: Path, tmp_path: Path) -> None:
    sae, path = make_sae(), tmp_path / "features.sqlite"
    measured = Feature(7, "mine", "automatic", 0.5, contexts=(Context(("a",), (1.0,), 0, "brown"),))
    with KnowledgeStore.create(path, sae_digest=sae.digest, n_features=N, meta={"tokens": 9}) as writer:
        writer.add([measured, Feature(8, "by hand", "hand")])
    assert write(neuronpedia.read(export, sae), sae, path) == 2
    with KnowledgeStore.open(path) as store:
        known = store.feature(7)
        assert (known.label, known.density, known.contexts[0].source) == ("French cities", 0.5, "brown")
        assert (known.max_activation, known.promoted[0][0]) == (62.5, " Paris")
        assert store.feature(8).label == "by hand"
        assert store.meta["tokens"] == 9


def test_an_export_of_another_dictionary_is_refused(export: Path, tmp_path: Path) -> None:
    other = make_sae(neuronpedia_id="gemma-2-2b/12-gemmascope-res-16k")
    with pytest.raises(KnowledgeError, match=r"batch-0\.jsonl\.gz:1: is about .*20-gemma.*expected .*12-gemma"):
        neuronpedia.read(export, other)
    mixed = jsonl(tmp_path / "m.jsonl", explanation("1", "a"), explanation("2", "b", layer="21-gemmascope-res-16k"))
    with pytest.raises(KnowledgeError, match=r"m\.jsonl:2: is about"):
        neuronpedia.read(mixed, make_sae())
    write(neuronpedia.read(export, make_sae()), make_sae(), tmp_path / "f")
    with pytest.raises(KnowledgeError, match="digest"):
        write(neuronpedia.read(export, make_sae()), make_sae(Hook("resid_post", 3)), tmp_path / "f")


BAD_ROWS = {
    "index beyond": explanation(str(N), "x"),
    "index negative": explanation("-1", "x"),
    "index true": explanation(True, "x"),
    "index a fraction": explanation(1.0, "x"),
    "index with a space": explanation(" 1", "x"),
    "index in other digits": explanation("٣", "x"),
    "index endless": explanation("1" * 5000, "x"),
    "index missing": {**WHERE, "description": "x"},
    "description a number": explanation("1", 17),
    "description null": explanation("1", None),
    "not JSON": "{'index': 1}",
    "a list": "[1, 2]",
    "deep": "[" * 100_000,
    "NaN": '{"index": "1", "frac_nonzero": NaN}',
    "infinite": '{"index": "1", "maxActApprox": 1e999}',
    "huge integer": '{"index": "1", "maxActApprox": 1' + "0" * 400 + "}",
    "density true": {**WHERE, "index": "1", "frac_nonzero": True},
    "lists of two lengths": {**WHERE, "index": "1", "pos_str": ["a"], "pos_values": [1, 2]},
    "tokens that are numbers": {**WHERE, "index": "1", "tokens": [1], "values": [1]},
    "values that are text": {**WHERE, "index": "1", "tokens": ["a"], "values": ["1"]},
    "no tokens": {**WHERE, "index": "1", "tokens": [], "values": []},
    "neighbour beyond": {**WHERE, "index": "1", "topkCosSimIndices": [N], "topkCosSimValues": [0.5]},
}


@pytest.mark.parametrize("row", BAD_ROWS.values(), ids=list(BAD_ROWS))
@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_a_hostile_line_is_an_error_with_file_and_line(tmp_path: Path, row: object, suffix: str) -> None:
    path = jsonl(tmp_path / f"batch-0.jsonl{suffix}", explanation("0", "good"), row)
    with pytest.raises(KnowledgeError, match=r"batch-0\.jsonl(\.gz)?:2"):
        neuronpedia.read(path, make_sae())


def test_a_line_without_end_is_refused_unread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(imports, "MAX_LINE", 1000)
    path = tmp_path / "a.jsonl"
    path.write_bytes(b" " * 5000)
    with pytest.raises(KnowledgeError, match=r"a\.jsonl:1: longer than 1000 bytes"):
        neuronpedia.read(path, make_sae())


def test_a_gzip_bomb_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(imports, "_FREE", 100_000)
    path = tmp_path / "batch-0.jsonl.gz"
    path.write_bytes(gzip.compress(b"\n" * 20_000_000))
    with pytest.raises(KnowledgeError, match=r"batch-0\.jsonl\.gz:\d+: the file unpacks to more than"):
        neuronpedia.read(path, make_sae())


@pytest.mark.parametrize(
    "content",
    [b"not gzip", gzip.compress(b'{"index": "1"}\n' * 100)[:-20], b"\x1f\x8b\x08"],
    ids=["another format", "the end is missing", "a header alone"],
)
def test_a_damaged_gzip_file_is_an_error(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "batch-0.jsonl.gz"
    path.write_bytes(content)
    with pytest.raises(KnowledgeError, match=r"batch-0\.jsonl\.gz:\d+"):
        neuronpedia.read(path, make_sae())


def test_text_that_no_file_can_hold_is_cleaned(tmp_path: Path) -> None:
    sae, path = make_sae(), tmp_path / "f"
    rows = [
        explanation("1", "a\ud800b\x00c\nd", typeName="\ud800"),
        {**WHERE, "index": "1", "tokens": ["\ud800"], "values": [1]},
    ]
    write(neuronpedia.read(jsonl(tmp_path / "a.jsonl", *rows), sae), sae, path)
    with KnowledgeStore.open(path) as store:
        assert (store.feature(1).label, store.feature(1).contexts[0].tokens) == ("a b c d", ("?",))


def test_a_folder_without_an_export_says_what_was_expected(tmp_path: Path) -> None:
    with pytest.raises(KnowledgeError, match="explanations, features, activations"):
        neuronpedia.read(tmp_path, make_sae())
    with pytest.raises(KnowledgeError, match="MODULE_latentN"):
        delphi.read(tmp_path, make_sae())


# delphi


def judged(right: int, wrong: int, activating: bool) -> list[dict[str, Any]]:
    told = [activating] * right + [not activating] * wrong
    return [
        {"str_tokens": ["a"], "distance": 1, "activating": activating, "prediction": p, "probability": None}
        for p in told
    ]


@pytest.fixture
def results(tmp_path: Path) -> Path:
    folder = tmp_path / "results" / "run"
    for module, index, text in (
        ("layers.20", 5, "ships\nand boats"),
        ("layers.20", 61, "taxes"),
        ("layers.3", 5, "no"),
    ):
        name = f"{module}_latent{index}.txt"
        for part, content in (
            ("explanations", text),
            ("scores/detection", judged(8, 2, True) + judged(10, 0, False)),
            ("scores/fuzz", judged(5, 5, True) + judged(5, 5, False) + [{"activating": True, "prediction": None}]),
        ):
            (folder / part).mkdir(parents=True, exist_ok=True)
            (folder / part / name).write_text(json.dumps(content))
    (folder / "run_config.json").write_text("{}")
    return folder


def test_delphis_results_become_labels_of_the_module_that_the_dictionary_reads(results: Path, tmp_path: Path) -> None:
    sae = make_sae()
    assert delphi.looks_like(results)
    for folder in (results, results / "explanations"):
        found = delphi.read(folder, sae)
        assert {i: e.text for i, e in found.explanations.items()} == {5: "ships and boats", 61: "taxes"}
        assert found.explanations[5].score == pytest.approx((0.9 + 0.5) / 2)
    assert write(found, sae, tmp_path / "f") == 2
    with KnowledgeStore.open(tmp_path / "f") as store:
        assert (store.feature(5).label, store.feature(5).label_source) == ("ships and boats", "delphi")
    assert set(delphi.read(results, make_sae(Hook("resid_pre", 4))).explanations) == {5}


def test_delphis_results_for_other_places_are_refused(results: Path) -> None:
    with pytest.raises(KnowledgeError, match=r"explains layers\.20, layers\.3; this SAE reads resid_post\(9\)"):
        delphi.read(results, make_sae(Hook("resid_post", 9)))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        (f"layers.20_latent{N}.txt", b'"beyond"'),
        ("layers.20_latent1.txt", b"no JSON"),
        ("layers.20_latent1.txt", b"17"),
        ("layers.20_latent1.txt", b'"\xff"'),
        ("layers.20_latent1.txt", b"[" * 100_000),
        ("layers.20_latent1.txt", b'"' + b"x" * (2 << 20) + b'"'),
    ],
)
def test_a_hostile_explanation_file_is_named(results: Path, name: str, content: bytes) -> None:
    (results / "explanations" / name).write_bytes(content)
    with pytest.raises(KnowledgeError, match=name.replace(".", r"\.")):
        delphi.read(results, make_sae())


def test_a_hostile_score_file_is_named(results: Path) -> None:
    (results / "scores" / "fuzz" / "layers.20_latent5.txt").write_text('{"a": 1}')
    with pytest.raises(KnowledgeError, match=r"fuzz.layers\.20_latent5\.txt"):
        delphi.read(results, make_sae())
