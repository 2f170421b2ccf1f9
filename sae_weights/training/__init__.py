"""Training dictionaries on a causal language model: text, activations, trainer, evaluation, card."""
