"""Training a BatchTopK SAE on a causal language model: corpus, activations, trainer, evaluation, card."""
