"""The server: an OpenAI-compatible API and a vLLM plugin whose requests may edit the residual stream."""
