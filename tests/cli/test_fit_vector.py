"""``editserver fit vector`` from a file of pairs to a vector that a server's library loads."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import uvicorn
from fastapi import FastAPI
from typer.testing import CliRunner

from editserver import __version__
from editserver.cli.main import app
from editserver.library import MAX_NOTES_BYTES, Vector, VectorLibrary
from sae_weights.precision import quick_dtype

PAIRS = Path(__file__).parents[2] / "examples" / "pairs" / "formal.jsonl"
runner = CliRunner()


@pytest.fixture(scope="session")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    file.write_text("Tell me about a walk.\n\nDescribe a kitchen.\n")
    return file


def fit(*arguments: object):
    return runner.invoke(app, ["fit", "vector", *map(str, arguments)], env={"COLUMNS": "160"})


@pytest.fixture(scope="session")
def fitted(tmp_path_factory: pytest.TempPathFactory, prompts: Path) -> SimpleNamespace:
    """One small real fit of the example pairs: two layers compared, a dose curve of three points, a report."""
    folder = tmp_path_factory.mktemp("fit")
    arguments = ["formal", "--pairs", PAIRS, "--layers", "10,15", "--library", folder / "library"]
    arguments += ["--report", folder / "report", "--prompts", prompts, "--doses", "0.4", "--tokens", 10]
    result = fit(*arguments)
    assert result.exit_code == 0, result.output
    return SimpleNamespace(arguments=arguments, output=result.output, folder=folder, library=folder / "library")


def test_the_vector_is_in_the_library_with_its_provenance(fitted):
    vector = VectorLibrary(fitted.library).get("formal")
    ((layer, row),) = vector.layers.items()
    assert layer in (10, 15)
    assert row.shape == (576,)
    meta = vector.meta
    assert meta["model"]["name"] == "smollm2-135m-instruct"
    assert len(meta["model"]["config_sha256"]) == 64
    assert meta["model"]["dtype"] == str(quick_dtype()).removeprefix("torch.")
    assert meta["examples"]["positive"] == meta["examples"]["negative"] == 48
    assert meta["examples"]["source"] == "formal.jsonl"
    assert len(meta["examples"]["sha256"]) == 64
    assert meta["split"] == {"seed": 0, "held_out_share": 0.25, "train": [36, 36], "held_out": [12, 12]}
    assert (meta["method"], meta["pooling"], meta["editserver"]) == ("mean", "mean", __version__)
    assert meta["layers_compared"] == [10, 15]
    assert meta["fit"]["layer"] == layer
    assert meta["fit"]["held_out_auroc"]["low"] > 0.5
    assert meta["fit"]["norm"] == pytest.approx(np.linalg.norm(row), rel=1e-4)
    curve = meta["dose_curve"]
    points = [dict(zip(curve["columns"], point, strict=True)) for point in curve["points"]]
    assert [point["dose"] for point in points] == [-0.4, 0.0, 0.4]
    assert points[0]["effect"] < points[2]["effect"]
    assert meta["recommended_strength"] in (None, points[2]["strength"])
    assert len(json.dumps(vector.meta)) < MAX_NOTES_BYTES / 8


def test_nothing_of_this_machine_is_stored(fitted):
    notes = json.dumps(VectorLibrary(fitted.library).get("formal").meta)
    assert str(fitted.folder) not in notes
    assert str(Path.home()) not in notes
    assert str(PAIRS.parent) not in notes


def test_fitting_again_gives_the_same_version(fitted):
    library = VectorLibrary(fitted.library)
    before = library.find("formal")
    stored = library.get("formal")
    # As if it had been fitted last week: the day alone makes no new version.
    library.put("formal", Vector(stored.layers, stored.description, {**stored.meta, "date": "2001-02-03"}))
    older = library.find("formal")
    result = fit(*fitted.arguments, "--json")
    assert result.exit_code == 0, result.output
    assert VectorLibrary(fitted.library).find("formal") == older
    assert older.version == before.version + 1
    assert json.loads(result.stdout)["vector"]["digest"] == older.digest


def test_the_report_has_figures_a_picture_and_a_request(fitted):
    report = json.loads((fitted.folder / "report" / "report.json").read_text())
    assert [layer["layer"] for layer in report["layers_compared"]] == [10, 15]
    assert {"answer", "strength"} == set(report["answers"][0])
    assert (fitted.folder / "report" / "dose.png").read_bytes().startswith(b"\x89PNG")
    for word in ("AUROC held out", "dose curve", "version 1", "curl http", '"vector": "formal"', "Steer(vector="):
        assert word in fitted.output


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "give either --pairs FILE, or --positive FILE and --negative FILE"),
        (["--pairs", PAIRS, "--positive", PAIRS], "give either --pairs"),
        (["--positive", PAIRS], "go together"),
        (["--pairs", PAIRS, "--layer", 1, "--layers", "all"], "--layer fits one layer"),
        (["--pairs", PAIRS, "--library", "x", "--url", "http://127.0.0.1:9"], "give one of them"),
        (["--pairs", PAIRS, "--url", "http://127.0.0.1:9"], "--url http://127.0.0.1:9: cannot be reached"),
        (["--pairs", PAIRS, "--library", PAIRS], "is not a folder"),
        (["--pairs", PAIRS, "--layers", "10,x"], "'x' is not a layer; the model has 0..29"),
        (["--pairs", PAIRS, "--layer", 30], "'30' is not a layer; the model has 0..29"),
        (["--pairs", PAIRS, "--doses", "0.1,much"], "'much' is not a number"),
        (["--pairs", "none.jsonl"], "none.jsonl: cannot be read"),
        (["--pairs", PAIRS, "--model", "no/such-folder/there"], "--model no/such-folder/there: cannot be loaded"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_stored(tmp_path, arguments, said):
    stored = () if {"--library", "--url"} & set(arguments) else ("--library", tmp_path / "library")
    result = fit("formal", *arguments, *stored)
    assert result.exit_code == 2
    assert said in result.stderr
    assert not list(tmp_path.iterdir())


def test_a_name_that_is_no_name_is_refused():
    result = fit("a/b", "--pairs", PAIRS)
    assert result.exit_code == 2
    assert "'a/b' is not a name" in result.stderr


def test_pca_of_two_separate_lists_is_refused(tmp_path):
    for name in ("good", "bad"):
        (tmp_path / name).write_text("\n".join(f"{name} {i}" for i in range(20)))
    result = fit("x", "--positive", tmp_path / "good", "--negative", tmp_path / "bad", "--method", "pca")
    assert result.exit_code == 2
    assert "use --method mean" in result.stderr


# a running server's library ------------------------------------------------------------------------------------------


@pytest.fixture
def library_server(tmp_path: Path) -> Iterator[str]:
    """The server's own library and capability routes on their real state, without an engine behind them."""
    from editserver.api import errors, routes_catalogue, routes_library
    from editserver.api.capacity import Capacity
    from editserver.api.state import EditState
    from editserver.catalogue import build_catalogue
    from editserver.engine.config import EngineConfig
    from editserver.settings import Settings
    from interventions.errors import InterventionError

    config, settings = EngineConfig(armed=(10, 20)), Settings(library=tmp_path / "served")
    catalogue = build_catalogue(config, settings, d_model=576, n_layers=30, vocab_size=49152, tokenizer=None)
    api = FastAPI()
    api.add_exception_handler(InterventionError, errors.handle)
    api.include_router(routes_catalogue.router)
    api.include_router(routes_library.router)
    capacity = Capacity(config.bank_rows)
    api.state.editserver = EditState(config, settings, catalogue, capacity, "0", "smollm2-135m-instruct", api.state)
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    server = uvicorn.Server(uvicorn.Config(api, port=port, log_level="error"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.05)
    yield f"http://127.0.0.1:{port}"
    server.should_exit = True
    thread.join(10)


def test_a_vector_can_go_to_a_running_server(library_server, tmp_path):
    few = tmp_path / "few.jsonl"
    few.write_text("".join(PAIRS.read_text().splitlines(keepends=True)[:12]))
    arguments = ["formal", "--pairs", few, "--layer", 15, "--url", library_server, "--no-curve"]
    first = fit(*arguments)
    assert first.exit_code == 0, first.output
    stored = VectorLibrary(tmp_path / "served").get("formal")
    assert list(stored.layers) == [15]
    assert stored.meta["dose_curve"] is None
    assert "version 1" in first.output
    assert "restart it with --arm-layers 15" in " ".join(first.output.split())
    assert f"curl {library_server}/v1/chat/completions" in first.output
    again = fit(*arguments)
    assert again.exit_code == 0, again.output
    assert VectorLibrary(tmp_path / "served").find("formal").version == 1
