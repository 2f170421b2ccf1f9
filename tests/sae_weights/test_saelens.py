"""SAELens folders: written and read back, read lazily, older configs, what lies beside the weights."""

from __future__ import annotations

import json
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file

from sae_weights import Folding, Hook, SAEFormatError, load_sae, save_saelens
from sae_weights.formats.tensor_file import TensorFile


def write(folder, tensors, **config):
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "sae_weights.safetensors")
    n, d = tensors["W_dec"].shape
    metadata = {"sae_lens_version": "6.54.12", "hook_name": "blocks.3.hook_resid_post", **config.pop("metadata", {})}
    full = {"architecture": "standard", "d_in": d, "d_sae": n, "apply_b_dec_to_input": False, "metadata": metadata}
    (folder / "cfg.json").write_text(json.dumps(full | config))
    return folder


def tensors(n=16, d=6, **more):
    g = torch.Generator().manual_seed(5)
    base = {
        "W_enc": torch.randn(d, n, generator=g),
        "W_dec": torch.randn(n, d, generator=g),
        "b_enc": torch.randn(n, generator=g),
        "b_dec": torch.randn(d, generator=g),
    }
    return {name: tensor for name, tensor in (base | more).items() if tensor is not None}


@pytest.mark.parametrize("architecture", ["relu", "jumprelu", "gated", "topk", "batchtopk", "abstopk", "matryoshka"])
@pytest.mark.parametrize("input_norm", ["none", "constant_norm_rescale", "layer_norm"])
def test_what_is_written_is_read_back_bit_for_bit(make_sae, tmp_path, architecture, input_norm):
    sae = make_sae(architecture, input_norm=input_norm, metadata={"model_name": "tiny", "median_norm": 170.5})
    again = load_sae(save_saelens(sae, tmp_path, metadata={"note": "x"}, sidecar={"max_activation": [1.0, 2.0]}))
    x = torch.randn(4, sae.d_model) * 3
    assert torch.equal(again.encode(x), sae.encode(x))
    assert torch.equal(again.decode_for(x, sae.encode(x)), sae.decode_for(x, sae.encode(x)))
    assert (again.hook, again.input_norm, again.k, again.digest) == (sae.hook, input_norm, sae.k, sae.digest)
    # SAELens has no BatchTopK at inference, nor groups: they are written as the JumpReLU that they compute.
    assert again.architecture == {"batchtopk": "jumprelu", "matryoshka": "jumprelu"}.get(architecture, architecture)
    assert {name: again.metadata[name] for name in ("model_name", "median_norm", "note", "max_activation")} == {
        "model_name": "tiny",
        "median_norm": 170.5,
        "note": "x",
        "max_activation": [1.0, 2.0],
    }


def test_bf16_storage_keeps_activations_near_b_dec(make_sae, tmp_path):
    sae = make_sae("gated", d=256, n=64)
    folder = save_saelens(sae, tmp_path, dtype=torch.bfloat16)
    stored = load_file(folder / "sae_weights.safetensors")
    assert stored["W_enc"].dtype == stored["W_dec"].dtype == torch.bfloat16
    assert stored["b_gate"].dtype == torch.float32
    x = sae.b_dec[None]
    error = load_sae(folder).pre_activations(x) - sae.pre_activations(x)
    assert error.abs().max() < 1e-4
    # What rounding W_enc alone would have done there.
    assert (x @ (sae.W_enc.bfloat16().float() - sae.W_enc).T).abs().max() > 1e-2


def test_a_dtype_that_is_not_stored_is_refused(make_sae, tmp_path):
    with pytest.raises(ValueError, match=r"dtype torch\.int8; expected"):
        save_saelens(make_sae(), tmp_path, dtype=torch.int8)


# Laziness


@pytest.fixture
def reads(monkeypatch):
    """Every part of a file that is read: (tensor, elements)."""
    seen = []
    part, picked = TensorFile._part, TensorFile._picked
    monkeypatch.setattr(TensorFile, "_part", lambda self, name, where: record(seen, name, part(self, name, where)))
    monkeypatch.setattr(TensorFile, "_picked", lambda self, name, *at: record(seen, name, picked(self, name, *at)))
    return seen


def record(seen, name, tensor):
    seen.append((name, tensor.numel()))
    return tensor


@pytest.mark.parametrize("transpose_bytes", [0, 256 << 20])
def test_opening_reads_vectors_and_rows_read_rows(tmp_path, reads, monkeypatch, transpose_bytes):
    monkeypatch.setattr("sae_weights.formats.layout.TRANSPOSE_BYTES", transpose_bytes)
    folder = write(tmp_path, tensors(n=400), apply_b_dec_to_input=True)
    sae = load_sae(folder)
    assert {name for name, _ in reads} == {"b_enc", "b_dec"}
    reads.clear()
    sae.rows([3, 399])
    assert sum(count for name, count in reads if name == "W_dec") == 2 * 6
    encoder = sum(count for name, count in reads if name == "W_enc")
    assert encoder == (2 * 6 if transpose_bytes == 0 else 400 * 6)
    assert not sae.materialised
    sae.encode(torch.zeros(1, 6))
    assert sae.materialised


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("transpose_bytes", [0, 256 << 20])
def test_rows_are_the_same_however_they_are_read(tmp_path, monkeypatch, dtype, transpose_bytes):
    stored = {name: tensor.to(dtype) for name, tensor in tensors(n=40).items()}
    monkeypatch.setattr("sae_weights.formats.layout.TRANSPOSE_BYTES", transpose_bytes)
    sae = load_sae(write(tmp_path, stored))
    rows = sae.rows([39, 0, 7])
    assert torch.equal(rows.encoder, stored["W_enc"].T[[39, 0, 7]].float())
    assert torch.equal(rows.decoder, stored["W_dec"][[39, 0, 7]].float())
    assert len(sae.rows([])) == 0
    digest = sae.digest
    assert torch.equal(sae.W_enc, stored["W_enc"].T.float())
    assert digest == load_sae(tmp_path).digest


def test_a_few_features_of_a_4_gib_file_cost_a_few_pages(tmp_path):
    """The file is a hole on disk; reading it whole would fill 4 GiB of memory and take seconds."""
    d, n = 1024, 1 << 19
    header, offset = {}, 0
    for name, shape in {"W_enc": [d, n], "W_dec": [n, d], "b_dec": [d], "b_enc": [n]}.items():
        size = 4 * torch.Size(shape).numel()
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header).encode()
    write(tmp_path, tensors(n=2, d=2), d_in=d, d_sae=n)
    with open(tmp_path / "sae_weights.safetensors", "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + offset)

    def resident():
        with open("/proc/self/status") as status:
            return next(int(line.split()[1]) for line in status if line.startswith("VmRSS")) * 1024

    before = resident()
    rows = load_sae(tmp_path).rows([0, 100_000, n - 1])
    assert rows.encoder.shape == (3, d)
    assert resident() - before < 128 << 20


def test_a_file_that_changed_after_opening_is_refused(tmp_path):
    sae = load_sae(write(tmp_path, tensors()))
    write(tmp_path, tensors(b_enc=torch.zeros(16)))
    with pytest.raises(SAEFormatError, match="changed on disk since it was opened"):
        sae.rows([1])
    (tmp_path / "sae_weights.safetensors").unlink()
    with pytest.raises(SAEFormatError, match="changed on disk since it was opened"):
        sae.encode(torch.zeros(1, 6))


# Conventions that the loader folds


def test_a_batchtopk_training_checkpoint_becomes_its_threshold_form(tmp_path):
    raw = tensors(topk_threshold=torch.tensor(0.8, dtype=torch.float64))
    sae = load_sae(write(tmp_path, raw, architecture="batchtopk", k=4.5))  # k: a mean, of no use at inference
    assert (sae.architecture, sae.k, sae.row_separable) == ("batchtopk", None, True)
    norm = raw["W_dec"].norm(dim=-1)
    x = torch.randn(50, 6)
    p = (x @ raw["W_enc"] + raw["b_enc"]) * norm
    torch.testing.assert_close(sae.encode(x), p.relu() * (p > 0.8), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(sae.rows([2]).threshold, torch.tensor([0.8]))
    plain = load_sae(write(tmp_path / "plain", raw, architecture="batchtopk", rescale_acts_by_decoder_norm=False))
    assert torch.equal(plain.W_dec, raw["W_dec"])


def test_a_constant_input_scale_comes_from_the_caller_the_sidecar_or_the_training_run(tmp_path):
    folder = write(tmp_path, tensors(), normalize_activations="expected_average_only_in")
    with pytest.raises(SAEFormatError, match=r"cfg\.json: field 'normalize_activations' is 'expected_average_only_in'"):
        load_sae(folder)
    by_argument = load_sae(folder, norm_scaling_factor=0.5)
    raw, x = tensors(), torch.randn(9, 6)
    torch.testing.assert_close(by_argument.pre_activations(x), (0.5 * x) @ raw["W_enc"] + raw["b_enc"])
    f = by_argument.encode(x)
    torch.testing.assert_close(by_argument.decode_for(x, f), (f @ raw["W_dec"] + raw["b_dec"]) / 0.5)
    assert by_argument.input_norm == "none"

    (folder / "activation_scaler.json").write_text('{"scaling_factor": 0.25}')
    assert load_sae(folder).digest == load_sae(folder, norm_scaling_factor=0.25).digest
    (folder / "editserver.json").write_text('{"norm_scaling_factor": 0.5, "median_norm": 175}')
    assert load_sae(folder).digest == by_argument.digest
    assert load_sae(folder).metadata["median_norm"] == 175


@pytest.mark.parametrize("value", [0, -1.5, "0.5", True, [1]])
def test_a_scale_that_is_not_a_positive_number_is_refused(tmp_path, value):
    folder = write(tmp_path, tensors(), normalize_activations="expected_average_only_in")
    (folder / "editserver.json").write_text(json.dumps({"norm_scaling_factor": value}))
    with pytest.raises(
        SAEFormatError, match=r"editserver\.json: field 'norm_scaling_factor' is .*; expected a positive"
    ):
        load_sae(folder)


def test_a_scale_where_none_is_due_is_refused(tmp_path):
    with pytest.raises(SAEFormatError, match=r"norm_scaling_factor 0\.5 given, but normalize_activations is 'none'"):
        load_sae(write(tmp_path, tensors()), norm_scaling_factor=0.5)


def test_apply_b_dec_to_input_defaults_to_true_as_in_saelens(tmp_path):
    folder = write(tmp_path, tensors())
    config = json.loads((folder / "cfg.json").read_text())
    del config["apply_b_dec_to_input"]
    (folder / "cfg.json").write_text(json.dumps(config))
    raw, x = tensors(), torch.randn(3, 6)
    torch.testing.assert_close(load_sae(folder).pre_activations(x), (x - raw["b_dec"]) @ raw["W_enc"] + raw["b_enc"])


def test_a_hook_z_checkpoint_loads_encodes_and_cannot_be_edited(tmp_path):
    sae = load_sae(
        write(tmp_path, tensors(), reshape_activations="hook_z", metadata={"hook_name": "blocks.2.attn.hook_z"})
    )
    assert sae.hook == Hook("attn.z", 2)
    assert sae.hook.edit_layer is None
    assert sae.encode(torch.randn(4, 3, 2)).shape == (4, 16)


def test_the_hook_may_be_given_in_hugging_faces_words(tmp_path):
    folder = write(tmp_path, tensors(), metadata={"hook_name": None, "hf_hook_name": "model.layers.9"})
    assert load_sae(folder).hook == Hook("resid_post", 9)
    both = {"hook_name": "blocks.9.hook_resid_post", "hf_hook_name": "model.layers.9"}
    assert load_sae(write(tmp_path, tensors(), metadata=both)).hook == Hook("resid_post", 9)
    both["hf_hook_name"] = "model.layers.10"
    with pytest.raises(SAEFormatError, match="are different places"):
        load_sae(write(tmp_path, tensors(), metadata=both))


# Configs from before 6.0


def old(folder, raw, **config):
    write(folder, raw)
    n, d = raw["W_dec"].shape
    full = {"d_in": d, "d_sae": n, "hook_point": "blocks.8.hook_resid_pre", "model_name": "gpt2-small"}
    (folder / "cfg.json").write_text(json.dumps(full | config))
    return folder


def test_an_old_config_means_what_it_meant(tmp_path):
    sae = load_sae(old(tmp_path, tensors(scaling_factor=torch.ones(16)), activation_fn_str="relu"))
    assert (sae.architecture, sae.hook, sae.hook.edit_layer) == ("relu", Hook("resid_pre", 8), 7)
    assert sae.metadata["model_name"] == "gpt2-small"
    raw, x = tensors(), torch.randn(3, 6)
    torch.testing.assert_close(sae.pre_activations(x), (x - raw["b_dec"]) @ raw["W_enc"] + raw["b_enc"])


def test_an_old_topk_config_has_its_k_among_the_activations_arguments(tmp_path):
    sae = load_sae(old(tmp_path, tensors(), activation_fn_str="topk", activation_fn_kwargs={"k": 3}))
    assert (sae.architecture, sae.k) == ("topk", 3)


def test_an_old_boolean_normalisation_asks_for_its_scale(tmp_path):
    with pytest.raises(SAEFormatError, match="'expected_average_only_in', which scales inputs by a constant"):
        load_sae(old(tmp_path, tensors(), normalize_activations=True))
    assert load_sae(old(tmp_path, tensors(), normalize_activations=False)).input_norm == "none"


@pytest.mark.parametrize(
    ("changes", "raw", "message"),
    [
        ({"activation_fn_str": "tanh-relu"}, {}, "field 'activation_fn' is 'tanh-relu'; expected relu or topk"),
        ({"architecture": "topk", "activation_fn_str": "relu"}, {}, "field 'k' is None; expected a whole number"),
        ({"finetuning_scaling_factor": True}, {}, "field 'finetuning_scaling_factor' is True; expected false"),
        ({}, {"scaling_factor": torch.full((16,), 2.0)}, r"tensor 'scaling_factor' of shape \[16\] does not belong"),
    ],
)
def test_an_old_config_that_cannot_be_said_today_is_refused(tmp_path, changes, raw, message):
    with pytest.raises(SAEFormatError, match=message):
        load_sae(old(tmp_path, tensors(**raw), **changes))


def test_folding_again_after_writing_adds_nothing(make_sae, tmp_path):
    sae = make_sae("topk", folding=Folding(decoder_norm=True, subtract_b_dec=True))
    assert load_sae(save_saelens(load_sae(save_saelens(sae, tmp_path / "1")), tmp_path / "2")).digest == sae.digest
