"""``editserver doctor`` says what is wrong and what mends it, and its exit code says whether a server can run."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from editserver.cli import doctor
from editserver.engine.compat import version


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
