"""editserver: edit a language model's residual stream per request, while stock vLLM serves it."""

__version__ = "0.1.0"
