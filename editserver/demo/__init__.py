"""The demo: its model, and what `make demo` shows."""
