"""Hook names of both libraries, and which residual stream they are."""

from __future__ import annotations

import pytest

from sae_weights import Hook
from sae_weights.hook import parse_hook_name


@pytest.mark.parametrize(
    ("name", "hook", "edit_layer"),
    [
        ("blocks.15.hook_resid_post", Hook("resid_post", 15), 15),
        ("blocks.0.hook_resid_post", Hook("resid_post", 0), 0),
        ("blocks.15.hook_resid_pre", Hook("resid_pre", 15), 14),
        ("blocks.0.hook_resid_pre", Hook("resid_pre", 0), None),
        ("blocks.3.hook_out", Hook("resid_post", 3), 3),
        ("blocks.3.hook_in", Hook("resid_pre", 3), 2),
        ("blocks.7.hook_resid_mid", Hook("resid_mid", 7), None),
        ("blocks.7.hook_mlp_out", Hook("mlp_out", 7), None),
        ("blocks.7.attn.hook_z", Hook("attn.z", 7), None),
        ("blocks.7.mlp.hook_in", Hook("mlp.in", 7), None),
        ("model.layers.12", Hook("resid_post", 12), 12),
        ("model.layers.12.output", Hook("resid_post", 12), 12),
        ("model.layers.12.input", Hook("resid_pre", 12), 11),
        ("model.language_model.layers.12", Hook("resid_post", 12), 12),
        ("transformer.h.5", Hook("resid_post", 5), 5),
        ("model.layers.12.mlp", Hook("mlp", 12), None),
        ("ln_final.hook_normalized", None, None),
        ("hook_embed", None, None),
        ("blocks.x.hook_resid_post", None, None),
        ("", None, None),
    ],
)
def test_a_hook_name_says_which_residual_stream_it_is(name, hook, edit_layer):
    assert parse_hook_name(name) == hook
    if hook is not None:
        assert hook.edit_layer == edit_layer
        assert parse_hook_name(hook.hook_name) == hook


def test_names_are_written_as_transformer_lens_has_them():
    assert Hook("resid_post", 15).hook_name == "blocks.15.hook_resid_post"
    assert Hook("attn.z", 3).hook_name == "blocks.3.attn.hook_z"
