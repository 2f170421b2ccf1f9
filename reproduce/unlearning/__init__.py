"""Unlearning on the bundled model: maps from known to unknown, clamps behind gates, and a prompt, side by side."""
