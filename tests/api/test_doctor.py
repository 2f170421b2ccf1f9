"""``editserver doctor`` says what is wrong and what mends it, and its exit code says whether a server can run."""

from __future__ import annotations

import io
import re

import pytest
from rich.console import Console
from typer.testing import CliRunner

from editserver.cli import doctor, main
from editserver.engine.compat import version

from .conftest import Server


def report() -> tuple[int, str]:
    out = io.StringIO()
    code = doctor.examine(console=Console(file=out, width=200))
    return code, out.getvalue()


def test_a_sound_machine_passes() -> None:
    code, text = report()
    assert code == 0, text
    for name in ("Python", "torch", "vLLM", "plugins", "demo model", "SAEs", "memory", "compiler", "cache"):
        assert name in text


def test_a_missing_vllm_is_a_problem_with_its_command(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> str:
        raise version.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(version.metadata, "version", absent)
    finding = doctor.vllm_build()
    assert not finding.ok
    assert "pip install" in finding.mend


def test_companions_of_another_build_are_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    real = doctor.metadata.version
    monkeypatch.setattr(doctor.metadata, "version", lambda name: "0.28.0" if name == "torchvision" else real(name))
    finding = doctor.torch_build()
    assert (finding.ok, finding.mend) == (False, "pip uninstall torchvision")


def test_a_missing_compiler_is_a_note_not_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
    finding = doctor.compiler()
    assert finding.ok
    assert "--enforce-eager" in finding.mend


def test_one_problem_fails_the_examination(monkeypatch: pytest.MonkeyPatch) -> None:
    broken = doctor.Finding("memory", "none", "buy some")
    monkeypatch.setattr(doctor, "CHECKS", (doctor.python_version, lambda: broken))
    monkeypatch.setattr(doctor.CHECKS[1], "__name__", "memory")
    code, text = report()
    assert code == 1
    assert "buy some" in text


# -- what a configuration keeps in memory ------------------------------------------------------------------------------


def told(monkeypatch: pytest.MonkeyPatch, *arguments: str, code: int = 0) -> str:
    """What ``editserver doctor`` prints for a configuration, without its checks of the machine."""
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    monkeypatch.setenv("VLLM_PLUGINS", "editserver")
    monkeypatch.setenv("VLLM_USE_AOT_COMPILE", "1")
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(doctor, "examine", lambda selftest: 0)
    done = CliRunner().invoke(main.app, ["doctor", *arguments])
    assert done.exit_code == code, done.output
    return done.output


def test_a_configuration_is_told_buffer_by_buffer(monkeypatch: pytest.MonkeyPatch) -> None:
    flags = ("--limit", "propositions=200", "--bank-rows", "2048", "--full-encode", "none")
    text = told(monkeypatch, "demo", "--dtype", "bfloat16", "--max-num-batched-tokens", "4096", *flags)
    rows = {cells[1].strip(): cells[3].strip() for line in text.splitlines() if len(cells := line.split("│")) > 3}
    assert rows["row bank"] == f"{2048 * (2 * 576 + 4) * 4 / 2**20:.2f} MiB"
    assert rows["stream of a step"] == f"{(4096 + 2) * 576 * 4 / 2**20:.2f} MiB"
    assert rows["hits of gates"] == "24 B"
    assert rows["propositions of rules"] == f"{3 * 4 * 8} B"
    assert "whole dictionaries" not in rows
    assert "A token's KV is 23,040 bytes" in text
    assert f"{120 / (120 + 23040):.2%}" in text


def test_a_configuration_that_cannot_be_served_is_refused_as_serve_does(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "--sae nowhere" in told(monkeypatch, "demo", "--sae", "nowhere", code=2)
    assert "'./nowhere'" in told(monkeypatch, "./nowhere", "--arm-layers", "1", code=2)
    text = told(monkeypatch, "--max-model-len", "2048", "demo", code=2)
    assert "MODEL comes first: editserver doctor MODEL --max-model-len" in text
    text = told(monkeypatch, "demo", "--max-model-len", "999999", code=2)
    assert "editserver: " in text
    assert "max_model_len (999999) is greater than" in text


def test_of_a_kv_cache_in_a_packed_format_nothing_is_guessed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "A token's KV is 11,520 bytes" in told(monkeypatch, "demo", "--kv-cache-dtype", "fp8")
    text = told(monkeypatch, "demo", "--kv-cache-dtype", "nvfp4")
    assert "row bank" in text
    assert "A token's KV" not in text


@pytest.mark.engine
def test_the_tokens_that_are_told_are_those_of_the_server(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    text = told(monkeypatch, "demo", "--block-size", "32", "--max-model-len", "1024", "--arm-layers", "10,15,20")
    (here,) = re.findall(r"hold KV, ([\d,]+) tokens", text)
    log = server.log.read_text()
    assert re.findall(r"KV cache size: ([\d,]+) tokens", log) == [here]
    assert len(re.findall(r"editserver: [\d.]+ MiB reserved \(row bank", log)) == 1
