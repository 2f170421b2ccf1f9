"""``[NAME=]SOURCE``: bundled ids, folders, names, and the nearest id for a slip of the pen."""

from __future__ import annotations

import pytest

from sae_weights import SAEFormatError, bundled, catalogue, load_sae, resolve, save_saelens


@pytest.fixture
def shelf(make_sae, tmp_path, monkeypatch):
    """A bundled folder with two dictionaries."""
    root = tmp_path / "bundled"
    for seed, name in enumerate(["smollm2-135m/l15", "smollm2-135m/l20"]):
        save_saelens(make_sae(seed=seed), root / name)
    monkeypatch.setattr(catalogue, "BUNDLED_FOLDER", root)
    monkeypatch.chdir(tmp_path)
    return root


def test_bundled_ids_are_folders_with_a_config(shelf):
    (shelf / "smollm2-135m" / "notes").mkdir()
    assert bundled() == ["smollm2-135m/l15", "smollm2-135m/l20"]


def test_a_bundled_id_is_its_own_name(shelf):
    name, sae = resolve("smollm2-135m/l15")
    assert name == "smollm2-135m/l15"
    assert sae.digest == load_sae(shelf / "smollm2-135m/l15").digest


def test_a_folder_is_called_by_its_last_part_unless_named(shelf, make_sae, tmp_path):
    folder = save_saelens(make_sae(seed=7), tmp_path / "my dictionaries" / "late=layer")
    for source, expected in [
        (str(folder), "late=layer"),
        (f"mine={folder}", "mine"),
        ("a=smollm2-135m/l20", "a"),
        ("./my dictionaries/late=layer", "late=layer"),
        ("./bundled/smollm2-135m/l15/", "l15"),
    ]:
        assert resolve(source)[0] == expected
    assert resolve(str(folder))[1].digest == make_sae(seed=7).digest


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (
            "smollm2-135m/l16",
            r"'smollm2-135m/l16': neither a folder or file, nor a bundled SAE, .*; nearest bundled: smollm2-135m/l1",
        ),
        ("x=smolm2-135/l20", "nearest bundled: smollm2-135m/l20"),
        ("qqqq", "bundled: smollm2-135m/l15, smollm2-135m/l20"),
        (
            "gemma-scope-2b-pt-res/layer_20/width_16k/average_l0_70",
            "nearest in the registry: gemma-scope-2b-pt-res/layer_20/width_16k/average_l0_",
        ),
        ("gemma-scope-2b-pt-ress/layer_20/width_16k/average_l0_71", "nearest in the registry: gemma-scope-2b-pt-res/"),
        ("hf://google", r"expected hf://org/repo/path/in/repo"),
        ("hf://google/gemma-scope-2b-pt-res/../x", r"expected hf://org/repo/path/in/repo"),
        ("hf://google/gemma-scope-2b-pt-res@", "no revision behind '@'"),
        ("name=", r"names no SAE; expected \[NAME=\]SOURCE"),
        ("", "names no SAE"),
        ("bad name=smollm2-135m/l15", "'bad name' is no name"),
        ("=smollm2-135m/l15", "'' is no name"),
    ],
)
def test_a_source_that_is_nothing_names_what_is_near(shelf, source, message):
    with pytest.raises(SAEFormatError, match=message):
        resolve(source)


def test_a_folder_without_a_checkpoint_is_refused_by_file(shelf, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(SAEFormatError, match=r"empty: no known layout of an SAE.*SAELens: cfg\.json"):
        resolve(str(tmp_path / "empty"))


def test_what_ships_with_the_package_loads():
    for name in bundled():
        called, sae = resolve(name)
        assert called == name
        assert sae.hook.edit_layer is not None
        assert len(sae.rows([0, sae.n_features - 1])) == 2
