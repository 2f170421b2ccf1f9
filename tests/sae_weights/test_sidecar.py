"""What editserver has measured lies beside the weights, whatever the format, and joins the metadata."""

from __future__ import annotations

import json

import pytest

from sae_weights import SAEFormatError, resolve, save_native, save_saelens
from sae_weights.sidecar import read_sidecar, sidecar_path, write_sidecar


@pytest.mark.parametrize("save", [save_native, save_saelens])
def test_fields_are_set_others_stay_and_the_metadata_has_them(save, make_sae, tmp_path):
    folder = save(make_sae(), tmp_path / "x")
    write_sidecar(folder, {"median_norm": 3.5})
    place = write_sidecar(folder, {"calibrated_threshold": 0.25})
    assert place == folder / "editserver.json"
    assert json.loads(place.read_text()) == {"median_norm": 3.5, "calibrated_threshold": 0.25}
    _, sae = resolve(str(folder))
    assert (sae.metadata["median_norm"], sae.metadata["calibrated_threshold"]) == (3.5, 0.25)
    assert sae.digest == make_sae().digest


def test_a_single_file_has_it_beside_itself(tmp_path):
    weights = tmp_path / "layer3.sae.pt"
    weights.write_bytes(b"x")
    assert write_sidecar(weights, {"a": 1}) == tmp_path / "layer3.sae.pt.editserver.json"
    assert read_sidecar(weights) == {"a": 1}
    assert read_sidecar(tmp_path / "layer4.sae.pt") == {}


def test_a_published_sidecar_is_not_written_into(tmp_path):
    (tmp_path / "blob").write_text('{"published": 1}')
    folder = tmp_path / "layer"
    folder.mkdir()
    (folder / "editserver.json").symlink_to(tmp_path / "blob")
    assert sidecar_path(folder) == tmp_path / "layer.editserver.json"
    write_sidecar(folder, {"a": 1})
    assert (tmp_path / "blob").read_text() == '{"published": 1}'


def test_a_damaged_one_is_named(tmp_path):
    (tmp_path / "editserver.json").write_text("[")
    with pytest.raises(SAEFormatError, match=r"editserver\.json"):
        read_sidecar(tmp_path)
