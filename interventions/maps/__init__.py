"""Latent remaps (unlearning): transfer functions, sequence gates, how both are fitted, and the artefact that holds them."""
