"""``editserver sae label`` and ``import-labels``, as a person types them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from editserver.cli.sae import app
from sae_weights import load_sae, save_saelens
from sae_weights.knowledge import FILE, KnowledgeStore

from .conftest import WORDS, Lab
from .test_labelling import make_passages


@pytest.fixture
def shelf(lab: Lab, tmp_path: Path) -> Path:
    """A model, a text and two dictionaries on disk."""
    lab.model.save_pretrained(tmp_path / "model")
    lab.tokenizer.save_pretrained(tmp_path / "model")
    rows = [{"text": "".join(WORDS[t] for t in p.tokens * 8).strip()} for p in make_passages(40)]
    (tmp_path / "text.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for layer in (0, 1):
        save_saelens(lab.sae(layer, seed=layer, median_norm=8.0), tmp_path / f"l{layer}")
    return tmp_path


def run(*arguments: object) -> tuple[int, str]:
    outcome = CliRunner().invoke(app, [str(a) for a in arguments])
    if outcome.exception is not None and not isinstance(outcome.exception, SystemExit):
        raise outcome.exception
    return outcome.exit_code, " ".join(outcome.output.split())


def test_label_reads_a_text_once_for_several_dictionaries(shelf: Path) -> None:
    (shelf / "l1" / "labels.json").write_text(json.dumps({"labels": {"3": "named by hand"}, "demo": {"prompt": "Hi"}}))
    code, shown = run(
        "label", shelf / "l0", shelf / "l1", "--model", shelf / "model", "--text", shelf / "text.jsonl", "--work", shelf
    )
    assert code == 0, shown
    for layer in (0, 1):
        sae = load_sae(shelf / f"l{layer}")
        with KnowledgeStore.open(shelf / f"l{layer}" / FILE, sae_digest=sae.digest) as store:
            features = [store.feature(i) for i in range(sae.n_features)]
            assert store.meta["tokens"] == sum(store.meta["tokens_by_source"].values()) > 1000
            assert [s["name"] for s in store.meta["sources"]] == ["text.jsonl"]
            assert (store.meta["hook"], "demo" in store.meta) == (f"resid_post({layer})", layer == 1)
            assert any(f.label and f.contexts and f.promoted and f.neighbours for f in features)
            assert (features[3].label == "named by hand", features[3].label_source == "hand") == (layer == 1,) * 2
    assert "24: " in shown
    assert "tokens judged" in shown


def test_label_leaves_another_dictionarys_file_alone_unless_told(shelf: Path) -> None:
    path = shelf / "l0" / FILE
    with KnowledgeStore.create(path, sae_digest="0" * 64, n_features=3, meta={}):
        pass
    before = path.read_bytes()
    arguments = (
        "label",
        shelf / "l0",
        "--model",
        shelf / "model",
        "--text",
        shelf / "text.jsonl",
        "--tokens",
        "500",
        "--work",
        shelf,
    )
    code, shown = run(*arguments)
    assert (code, path.read_bytes() == before) == (2, True)
    assert "--force replaces it" in shown
    code, shown = run(*arguments, "--force")
    assert code == 0, shown
    KnowledgeStore.open(path, sae_digest=load_sae(shelf / "l0").digest).close()


def test_imported_labels_survive_labelling_anew(shelf: Path) -> None:
    export = shelf / "batch-0.jsonl"
    export.write_text(json.dumps({"index": "2", "description": "published", "typeName": "np_max-act"}) + "\n")
    assert run("import-labels", shelf / "l0", export)[0] == 0
    assert (
        run(
            "label",
            shelf / "l0",
            "--model",
            shelf / "model",
            "--text",
            shelf / "text.jsonl",
            "--tokens",
            "500",
            "--work",
            shelf,
        )[0]
        == 0
    )
    with KnowledgeStore.open(shelf / "l0" / FILE) as store:
        known = store.feature(2)
        assert (known.label, known.label_source) == ("published", "neuronpedia:np_max-act")
        assert known.promoted


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("label", "{shelf}/l0", "--text", "{shelf}/bad.jsonl"), "bad.jsonl:2: not JSON"),
        (("label", "{shelf}/l0", "--text", "{shelf}/none.txt"), "none.txt"),
        (
            ("label", "{shelf}/l0", "--hand-labels", "{shelf}/hand.json", "--text", "{shelf}/text.jsonl"),
            "hand.json: index '99'",
        ),
        (("label", "{shelf}/l0", "{shelf}/l1", "--out", "x"), "for one SAE"),
        (("label", "{shelf}/nothing"), "nothing"),
        (("import-labels", "{shelf}/l0", "{shelf}/none"), "no such file"),
        (("import-labels", "{shelf}/l0", "{shelf}/model"), "say --format"),
        (
            ("import-labels", "{shelf}/l0", "{shelf}/text.jsonl", "--format", "yaml"),
            "expected auto, neuronpedia or delphi",
        ),
        (("import-labels", "{shelf}/l0", "{shelf}/text.jsonl"), "text.jsonl:1: index"),
    ],
)
def test_mistakes_are_sentences(shelf: Path, arguments: tuple[str, ...], message: str) -> None:
    (shelf / "bad.jsonl").write_text('{"text": "w1 w2"}\nno\n')
    (shelf / "hand.json").write_text('{"labels": {"99": "beyond"}}')
    given = [a.format(shelf=shelf) for a in arguments]
    if given[0] == "label":
        given += ["--model", str(shelf / "model"), "--work", str(shelf)]
    code, shown = run(*given)
    assert code == 2
    assert message in shown.replace(" ", "") or message in shown
