"""The tests can fail: each mutant of the engine is caught by the check that its named test makes."""

from __future__ import annotations

import importlib
import inspect
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.engine import checks
from tests.engine.lab import Lab
from tests.engine.mutants import MUTANTS, Mutant

pytestmark = pytest.mark.engine

_passed: set[str] = set()
"""Checks that the healthy engine has passed in this session."""


def _check(mutant: Mutant, tmp_path: Path) -> Any:
    arguments = mutant.arguments | ({"library": tmp_path} if mutant.check == "content_not_name" else {})
    return partial(getattr(checks, mutant.check), **arguments)


@pytest.mark.parametrize("name", MUTANTS)
def test_a_mutant_is_caught(lab: Lab, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str) -> None:
    mutant = MUTANTS[name]
    check = _check(mutant, tmp_path / "healthy")
    key = f"{mutant.check} {mutant.arguments}"
    if key not in _passed:
        check(lab)
        _passed.add(key)
    check = _check(mutant, tmp_path / "mutated")
    mutated = Lab(lab.engine)  # nothing that a healthy engine answered is remembered
    with monkeypatch.context() as patch:
        mutant.apply(patch, mutated)
        with pytest.raises(AssertionError) as caught:
            check(mutated)
    print(f"{name}: {str(caught.value).splitlines()[0][:200]}")
    lab.engine.reset_cache()
    lab.assert_nothing_left()


@pytest.mark.parametrize("name", MUTANTS)
def test_the_named_test_makes_the_check(name: str) -> None:
    mutant = MUTANTS[name]
    module, test = mutant.caught_by.split(".")
    source = inspect.getsource(getattr(importlib.import_module(f"tests.engine.{module}"), test))
    assert f"checks.{mutant.check}(lab" in source
