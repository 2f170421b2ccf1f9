"""Concepts as what a few latents say about a text, and how to take them away: pure functions of tensors, no server in sight."""
