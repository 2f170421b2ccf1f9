"""``editserver demo``: both answers, the receipt and the features, from a real server."""

from __future__ import annotations

from pathlib import Path

import pytest

from editserver.demo import side_by_side
from editserver.demo.side_by_side import SAE_ID, DemoError, Scene
from sae_weights.knowledge import FILE, KnowledgeStore

from .conftest import N_FEATURES, RELU, free_port, make_probes


def write_scene(folder: Path) -> Path:
    scene = folder / SAE_ID
    scene.mkdir(parents=True)
    demo = {"feature": 3, "value": 120.0, "prompt": "Tell me about Paris.", "label": "a probe direction"}
    know(scene, {"demo": demo})
    return folder


def know(folder: Path, meta: dict[str, object]) -> None:
    with KnowledgeStore.create(folder / FILE, sae_digest="0" * 64, n_features=N_FEATURES, meta=meta):
        pass


def test_a_missing_scene_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(DemoError, match="reinstall editserver"):
        Scene.read(tmp_path)
    for meta in ({}, {"demo": [1]}):
        know(tmp_path, meta)
        with pytest.raises(DemoError, match="reinstall editserver"):
            Scene.read(tmp_path)
    know(tmp_path, {"demo": {"feature": 1}})
    with pytest.raises(DemoError, match=r"value|prompt"):
        Scene.read(tmp_path)


def test_a_port_in_use_is_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import socket

    monkeypatch.setattr(side_by_side, "BUNDLED_FOLDER", write_scene(tmp_path))
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        assert side_by_side.show(port=taken.getsockname()[1], once=True) == 1
    assert "is in use" in capsys.readouterr().out


@pytest.mark.engine
def test_the_demo_shows_both_answers_the_receipt_and_the_features(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(side_by_side, "BUNDLED_FOLDER", write_scene(tmp_path))
    probe = make_probes(tmp_path)[RELU]
    flags = ["--sae", f"{SAE_ID}={probe}", "--enforce-eager", "--host", "127.0.0.1"]
    assert side_by_side.show(port=free_port(), once=True, flags=flags) == 0
    shown = capsys.readouterr().out
    for words in (
        "plain",
        "the edit: feature 3 (a probe direction): add 120",
        "receipt",
        "edit_features",
        "mean activation",
    ):
        assert words in shown, words
    assert "The two answers are the same" not in shown
