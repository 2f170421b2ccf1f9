"""A model of three layers with random weights, a tokenizer of whole words, and dictionaries whose features are known."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.decoders import Metaspace as MetaspaceDecoder
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Metaspace
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from sae_weights import SAE, Hook

WORDS = ["<unk>", "<|im_start|>", "<|im_end|>", *(f" w{i}" for i in range(57))]
"""Texts of the tokens."""
D_MODEL = 32
LAYERS = 3


@dataclass(frozen=True)
class Lab:
    model: Any
    tokenizer: Any

    def sae(self, layer: int, n_features: int = 24, seed: int = 0, threshold: float = 0.6, **metadata: object) -> SAE:
        """A JumpReLU dictionary of random directions at ``resid_post(layer)``; it fires on a fair share of tokens."""
        generator = torch.Generator().manual_seed(seed)
        rows = torch.randn(n_features, D_MODEL, generator=generator)
        return SAE.from_tensors(
            architecture="jumprelu",
            hook=Hook("resid_post", layer),
            W_enc=rows,
            W_dec=rows / rows.norm(dim=1, keepdim=True),
            b_dec=torch.zeros(D_MODEL),
            gate={"b_enc": torch.zeros(n_features), "threshold": torch.full((n_features,), threshold)},
            metadata=metadata,
        )


@pytest.fixture(scope="session")
def lab() -> Lab:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=D_MODEL,
        intermediate_size=48,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=False,
        initializer_range=0.3,
    )
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        model.model.norm.weight.uniform_(0.5, 1.5)
    words = Tokenizer(WordLevel({word.replace(" ", "▁"): i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = Metaspace()
    words.decoder = MetaspaceDecoder()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="<unk>", additional_special_tokens=["<|im_start|>", "<|im_end|>"]
    )
    return Lab(model, tokenizer)
