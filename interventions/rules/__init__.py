"""Logical rules over SAE features: their language, their checks, and what they conclude. Pure: no engine, no server."""
