"""`editserver sae list` and `sae registry`: what there is, and how the registry is brought up to date."""

from __future__ import annotations

import subprocess
import zipfile
from pathlib import Path

import pytest
from typer.testing import CliRunner

from editserver.cli import sae_list
from editserver.cli.sae import app
from sae_weights import FORMATS, bundled
from sae_weights.registry import registry, user_file

runner = CliRunner()
YAML = """
new-release:
  conversion_func: null
  model: gpt2-small
  repo_id: me/new
  saes: [{id: a, path: x}, {id: b, path: y}]
"""


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("EDITSERVER_CACHE", str(tmp_path / "cache"))


def run(*arguments):
    return runner.invoke(app, [str(one) for one in arguments])


def told(done):
    return " ".join(done.output.replace("│", " ").replace("┃", " ").split())


@pytest.fixture
def wheel(tmp_path):
    path = tmp_path / "sae_lens-7.1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("sae_lens/__init__.py", "raise RuntimeError('never run')")
        file.writestr("sae_lens/pretrained_saes.yaml", YAML)
    return path


def test_everything_is_cached_in_one_folder():
    from editserver.demo import model
    from sae_weights import cache

    assert cache.cache_root() == model.cache_root()


def test_the_bundled_ones_are_listed():
    done = run("list")
    assert done.exit_code == 0
    assert all(name in done.output for name in bundled())


def test_every_format_is_listed():
    done = run("list", "--formats")
    assert done.exit_code == 0
    assert all(one.name in done.output for one in FORMATS)


def test_the_registry_is_searched_by_words():
    done = run("list", "--registry", "goodfire llama-3.1")
    assert done.exit_code == 0
    (line,) = [line for line in done.output.splitlines() if "layer_19" in line]
    assert (
        line
        == "goodfire-llama-3.1-8b-instruct/layer_19  meta-llama/Llama-3.1-8B-Instruct  L0 91  llama3.1-8b-it/19-resid-post-gf"
    )
    assert "70b" not in done.output
    done = run("list", "--registry", "gemma", "--limit", "2")
    assert "add a word, or --limit" in told(done)
    done = run("list", "--registry", "gemma-scope-2b-pt-rez")
    assert done.exit_code == 2
    assert "near: gemma-scope-2b-pt-res" in told(done)


def test_the_registry_says_what_it_is():
    done = run("registry")
    assert done.exit_code == 0
    assert "sae-lens 6.54.12" in told(done)
    assert "13,857 in 170 releases" in told(done)
    assert "ships with editserver" in told(done)


def test_a_wheel_is_taken_over_without_being_run_and_can_be_dropped_again(wheel):
    done = run("registry", "--from", wheel)
    assert done.exit_code == 0, done.output
    assert "2 new ids, 13,857 gone" in told(done)
    assert "sae-lens 7.1.0" in told(done)
    assert "refreshed; delete it to go back" in told(done)
    assert registry().get("new-release/b").path == "y"
    assert "new-release/a" in told(run("list", "--registry", "new"))
    user_file().unlink()
    assert "sae-lens 6.54.12" in told(run("registry"))


def test_a_yaml_file_is_taken_over(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(YAML)
    assert run("registry", "--from", path).exit_code == 0
    assert len(registry()) == 2


def test_refresh_downloads_the_newest_wheel_with_pip_and_keeps_nothing_of_it(wheel, monkeypatch):
    asked = []

    def pip(command, **_):
        asked.append(command)
        folder = Path(command[command.index("--dest") + 1])
        (folder / wheel.name).write_bytes(wheel.read_bytes())
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(sae_list.subprocess, "run", pip)
    done = run("registry", "--refresh")
    assert done.exit_code == 0, done.output
    assert "sae-lens 7.1.0" in told(done)
    assert asked[0][1:4] == ["-m", "pip", "download"]
    assert "--no-deps" in asked[0]
    assert asked[0][-1] == "sae-lens"
    assert not Path(asked[0][asked[0].index("--dest") + 1]).exists()


def test_a_refresh_that_fails_says_why_and_changes_nothing(monkeypatch):
    failed = subprocess.CompletedProcess([], 1, "", "noise\nERROR: No matching distribution found for sae-lens\n")
    monkeypatch.setattr(sae_list.subprocess, "run", lambda *_, **__: failed)
    done = run("registry", "--refresh")
    assert done.exit_code == 2
    assert "No matching distribution found" in told(done)
    assert not user_file().exists()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.yaml", "a: [", "not YAML"),
        ("x.yaml", "a: {model: m}", "no list 'saes'"),
        ("sae_lens-7.whl", "no archive", "not a wheel"),
    ],
)
def test_a_file_that_is_no_registry_is_refused(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_text(content)
    done = run("registry", "--from", path)
    assert done.exit_code == 2
    assert message in told(done)
    assert not user_file().exists()


def test_a_wheel_of_something_else_is_refused(tmp_path):
    path = tmp_path / "other-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("other/__init__.py", "")
    done = run("registry", "--from", path)
    assert done.exit_code == 2
    assert "holds no pretrained_saes.yaml" in told(done)
