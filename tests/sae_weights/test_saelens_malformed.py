"""A folder that is not a SAELens checkpoint is refused with the file and the field, whatever is wrong with it."""

from __future__ import annotations

import json
import pickle

import pytest
import torch
from safetensors.torch import save_file

from sae_weights import SAEFormatError, load_sae

N, D = 8, 4


@pytest.fixture
def folder(tmp_path):
    save_file(good_tensors(), tmp_path / "sae_weights.safetensors")
    (tmp_path / "cfg.json").write_text(json.dumps(good_config()))
    load_sae(tmp_path)
    return tmp_path


def good_tensors():
    return {
        "W_enc": torch.randn(D, N),
        "W_dec": torch.randn(N, D),
        "b_enc": torch.randn(N),
        "b_dec": torch.randn(D),
        "threshold": torch.rand(N),
    }


def good_config():
    return {
        "architecture": "jumprelu",
        "d_in": D,
        "d_sae": N,
        "dtype": "float32",
        "apply_b_dec_to_input": False,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": {"sae_lens_version": "6.54.12", "hook_name": "blocks.1.hook_resid_post"},
    }


MISSING = object()


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("architecture", MISSING, "field 'architecture' is missing; expected one of standard, jumprelu"),
        ("architecture", "jumpreluu", r"field 'architecture' is 'jumpreluu'.*did you mean 'jumprelu'"),
        ("architecture", "transcoder", "field 'd_out' is missing; expected a whole number"),
        ("architecture", "temporal", "'temporal', which is refused: it attends over all earlier tokens"),
        ("architecture", ["gated"], r"field 'architecture' is \['gated'\]; expected one of"),
        ("d_in", MISSING, "field 'd_in' is missing; expected a whole number"),
        ("d_in", "4", "field 'd_in' is '4'; expected a whole number"),
        ("d_in", 5, r"tensor 'W_enc' has shape \[4, 8\]; expected \[5, 8\]"),
        ("d_sae", 0, "field 'd_sae' is 0; expected a whole number of at least 1"),
        ("d_sae", True, "field 'd_sae' is True; expected a whole number"),
        ("d_sae", 9, r"tensor 'W_enc' has shape \[4, 8\]; expected \[4, 9\]"),
        ("d_sae", 1e400, "field 'd_sae' is inf; expected a whole number"),
        ("apply_b_dec_to_input", "yes", "field 'apply_b_dec_to_input' is 'yes'; expected true or false"),
        ("normalize_activations", "rms", "field 'normalize_activations' is 'rms'; expected one of none"),
        ("normalize_activations", "layernorm", "did you mean 'layer_norm'"),
        (
            "normalize_activations",
            "covariance_whitening",
            r"activation_whitening\.safetensors: no such file",
        ),
        ("reshape_activations", "hook_q", "field 'reshape_activations' is 'hook_q'; expected one of none, hook_z"),
        ("metadata", [], r"field 'metadata' is \[\]; expected an object"),
        ("metadata", {"sae_lens_version": "6.1"}, "metadata.hook_name missing; expected a hook of a layer"),
        (
            "metadata",
            {"sae_lens_version": "6.1", "hook_name": "ln_final.hook_scale"},
            "'ln_final.hook_scale'; expected",
        ),
        ("metadata", {"sae_lens_version": "6.1", "hook_name": 15}, "metadata.hook_name 15; expected a hook"),
    ],
)
def test_a_wrong_field_is_named(folder, field, value, message):
    config = good_config()
    if value is MISSING:
        del config[field]
    else:
        config[field] = value
    (folder / "cfg.json").write_text(json.dumps(config))
    with pytest.raises(SAEFormatError, match=message) as raised:
        load_sae(folder)
    assert str(folder) in str(raised.value)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (b"", r"cfg\.json: not JSON"),
        (b"{", r"cfg\.json: not JSON"),
        (b"[1, 2]", r"cfg\.json: holds a list; expected a JSON object"),
        (b"null", r"cfg\.json: holds null; expected a JSON object"),
        (b"\xff\xfe\x00", r"cfg\.json: not UTF-8"),
        (b"[" * 100_000, r"cfg\.json: not JSON"),
    ],
)
def test_a_config_that_is_no_json_object_is_refused(folder, config, message):
    (folder / "cfg.json").write_bytes(config)
    with pytest.raises(SAEFormatError, match=message):
        load_sae(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"W_enc": None}, r"no tensor 'W_enc'; expected one of shape \[4, 8\]\. It holds"),
        ({"W_enc": torch.zeros(N, D)}, r"tensor 'W_enc' has shape \[8, 4\]; expected \[4, 8\]"),
        ({"W_dec": torch.zeros(N, D, 1)}, r"tensor 'W_dec' has shape \[8, 4, 1\]; expected \[8, 4\]"),
        ({"b_dec": torch.zeros(N)}, r"tensor 'b_dec' has shape \[8\]; expected \[4\]"),
        ({"b_enc": None}, r"no tensor 'b_enc'"),
        ({"threshold": None}, r"no tensor 'threshold'"),
        ({"threshold": torch.zeros(())}, r"tensor 'threshold' has shape \[\]; expected \[8\]"),
        (
            {"W_dec": torch.zeros(N, D, dtype=torch.int32)},
            r"tensor 'W_dec' has dtype I32; expected F64, F32, F16, BF16",
        ),
        ({"r_mag": torch.zeros(N)}, r"tensor 'r_mag' of shape \[8\] does not belong to architecture 'jumprelu'"),
        ({"b_dec": torch.full((D,), float("nan"))}, "tensor b_dec holds values that are not finite"),
    ],
)
def test_a_wrong_tensor_is_named(folder, changes, message):
    kept = {name: tensor for name, tensor in (good_tensors() | changes).items() if tensor is not None}
    save_file(kept, folder / "sae_weights.safetensors")
    with pytest.raises(SAEFormatError, match=message) as raised:
        load_sae(folder)
    assert str(folder) in str(raised.value)


class Explosive:
    def __reduce__(self):
        return (exec, ("raise SystemError('unpickled')",))


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x00" * 7,
        b"\xff" * 64,
        (1 << 40).to_bytes(8, "little") + b"{}",
        (2).to_bytes(8, "little") + b"[]",
        (60).to_bytes(8, "little") + b'{"W_enc":{"dtype":"F32","shape":[4,8],"data_offsets":[0,128]}}'[:60],
        pickle.dumps({"W_enc": Explosive()}),
    ],
)
def test_a_file_that_is_not_safetensors_is_refused_and_never_unpickled(folder, content):
    (folder / "sae_weights.safetensors").write_bytes(content)
    with pytest.raises(SAEFormatError, match=r"sae_weights\.safetensors: not a readable safetensors file"):
        load_sae(folder)


def test_a_truncated_file_is_refused(folder):
    weights = folder / "sae_weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    with pytest.raises(SAEFormatError, match="not a readable safetensors file"):
        load_sae(folder)


def test_missing_files_are_named(folder, tmp_path):
    with pytest.raises(SAEFormatError, match="no such folder"):
        load_sae(tmp_path / "nowhere")
    with pytest.raises(SAEFormatError, match=r"cfg\.json: no known layout of an SAE"):
        load_sae(folder / "cfg.json")
    (folder / "sae_weights.safetensors").unlink()
    with pytest.raises(SAEFormatError, match=r"sae_weights\.safetensors: no such file"):
        load_sae(folder)
    (folder / "sae_weights.safetensors").mkdir()
    with pytest.raises(SAEFormatError, match=r"sae_weights\.safetensors"):
        load_sae(folder)
    (folder / "cfg.json").unlink()
    with pytest.raises(SAEFormatError, match=r"cfg\.json: no such file"):
        load_sae(folder)


def test_a_broken_sidecar_is_named(folder):
    (folder / "editserver.json").write_text("nonsense")
    with pytest.raises(SAEFormatError, match=r"editserver\.json: not JSON"):
        load_sae(folder)


@pytest.mark.parametrize("k", [MISSING, 0, -3, 2.5, "4", 9, None])
def test_topk_needs_a_k_that_fits(folder, k):
    config = good_config() | {"architecture": "topk"}
    if k is not MISSING:
        config["k"] = k
    (folder / "cfg.json").write_text(json.dumps(config))
    save_file({n: t for n, t in good_tensors().items() if n != "threshold"}, folder / "sae_weights.safetensors")
    with pytest.raises(SAEFormatError, match=r"field 'k' is|k: 9; expected 1\.\.8"):
        load_sae(folder)
