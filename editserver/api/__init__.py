"""The HTTP side: an endpoint plugin of vLLM's own server.

``plugin`` (attached by vLLM), ``guard`` (every body that enters), ``requests`` (typed bodies), ``serving`` (chat and
completions with edits), ``edit`` (one edited request), ``receipts`` and ``readings`` (what goes back), ``routes_*`` (our own
endpoints), ``capacity``, ``errors``. Only ``vllm_entry`` knows where things are inside ``vllm.entrypoints``.
"""
