"""What an edit means: specs, programs and their pure reference semantics. Needs torch, neither vLLM nor FastAPI."""
