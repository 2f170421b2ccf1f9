"""Held out means: no token of that document is trained on, quoted in a conversation or not."""

from __future__ import annotations

import json
from dataclasses import dataclass

import pytest

from sae_weights.training.corpus import Document
from sae_weights.training.run import Plan, texts
from sae_weights.training.text import HELD_OUT, WINDOWS, Text, chat_text, held_out, own_text, running_text


@dataclass
class Encoded:
    input_ids: list[int]


class Words:
    """A tokenizer that gives every distinct word an id."""

    def __init__(self):
        self.ids: dict[str, int] = {}

    def __call__(self, text, add_special_tokens):
        return Encoded([self.ids.setdefault(w, len(self.ids)) for w in text.split()])

    def apply_chat_template(self, messages, tokenize, add_generation_prompt=False):
        return " ".join(f"<{m['role']}> {m['content']}" for m in messages)


def document(name, words=3000):
    return " ".join(f"{name}w{i}" for i in range(words))


def words_of(side, tokenizer):
    names = {i: w for w, i in tokenizer.ids.items()}
    return {names[i].partition("w")[0] for sequence in side for i in sequence}


def test_a_document_is_on_one_side_only():
    tokenizer = Words()
    text = running_text([document(f"d{i}") for i in range(100)], tokenizer)
    train, held = words_of(text.train, tokenizer), words_of(text.held_out, tokenizer)
    assert not train & held
    assert len(train | held) == 100
    assert 0 < len(held) < 15


def test_the_share_held_out_is_the_one_stated():
    assert sum(held_out(f"document {i}") for i in range(20_000)) / 20_000 == pytest.approx(HELD_OUT, abs=0.006)


def test_windows_have_all_the_lengths_and_lose_nothing_but_a_short_rest():
    text = running_text([document("a", 10_000)], Words())
    side = text.train or text.held_out
    assert {len(w) for w in side} >= set(WINDOWS)
    assert sum(map(len, side)) >= 10_000 - 15


def test_a_conversation_goes_where_its_passage_is_from():
    passages = {f"p{i} " + "word " * 50 + f"end{i}": i for i in range(300)}
    documents = [Document("brown", passage) for passage in passages]
    conversations = [
        [{"role": "user", "content": f"Summarize this text:\n\n{p}"}, {"role": "assistant", "content": f"answer{i}"}]
        for p, i in passages.items()
    ]
    tokenizer = Words()
    text = chat_text(conversations, documents, tokenizer)
    names = {i: w for w, i in tokenizer.ids.items()}
    sides = [
        {names[i] for sequence in side for i in sequence if names[i].startswith(("p", "answer", "end"))}
        for side in (text.train, text.held_out)
    ]
    assert sides[0]
    assert sides[1]
    assert not sides[0] & sides[1]
    for passage, i in passages.items():
        side = sides[held_out(passage[:200])]
        assert {f"p{i}", f"answer{i}", f"end{i}"} <= side


def test_cap_keeps_the_first_sequences_up_to_the_number_of_tokens():
    text = Text(train=[[1] * 10, [2] * 10, [3] * 10])
    text.cap(25)
    assert text.train == [[1] * 10, [2] * 10]


def test_own_files_are_read_as_text_or_json_lines(tmp_path):
    (tmp_path / "a.txt").write_text(document("plain"))
    lines = [{"text": document(f"line{i}", 300)} for i in range(60)]
    lines.append({"messages": [{"role": "user", "content": "chatw1 chatw2"}]})
    (tmp_path / "b.jsonl").write_text("\n".join(map(json.dumps, lines)))
    tokenizer = Words()
    text = own_text([tmp_path / "a.txt", tmp_path / "b.jsonl"], tokenizer)
    found = words_of(text.train + text.held_out, tokenizer)
    assert {"plain", "line0", "line59", "chat"} <= found
    assert text.held_out


def test_one_long_file_still_has_held_out_windows(tmp_path):
    (tmp_path / "a.txt").write_text(document("plain", 20_000))
    text = own_text([tmp_path / "a.txt"], Words())
    assert text.train
    assert text.held_out
    assert not {tuple(s) for s in text.train} & {tuple(s) for s in text.held_out}


@pytest.mark.parametrize("line", ['{"txt": "a"}', "not json", "3", '{"text": 4}'])
def test_a_line_that_is_no_text_is_named(tmp_path, line):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "fine"}\n' + line)
    with pytest.raises(ValueError, match=r"a\.jsonl:2: "):
        own_text([path], Words())


def test_a_model_without_a_chat_template_is_trained_on_the_other_text(tmp_path, monkeypatch):
    made = [Document("brown", document(f"d{i}", 100)) for i in range(60)]
    for name in ("brown", "wordnet", "factbook"):
        monkeypatch.setattr(f"sae_weights.training.corpus.{name}", lambda cache: iter(made))
    monkeypatch.setattr("sae_weights.training.corpus.python_sources", lambda: iter(made))
    plan = Plan(layers=(1,), tokens=100, chats=None)
    found = texts(Words(), lambda: pytest.fail("the model was asked to chat"), plan, tmp_path, lambda *_: None)
    assert set(found) == {"prose", "glosses", "factbook", "code"}
