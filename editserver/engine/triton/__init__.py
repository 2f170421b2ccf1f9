"""The engine on a GPU: device tables, Triton kernels, and the step that launches them.

``capacity`` (how much of everything is reserved), ``arena`` (columns of fixed size at fixed addresses), ``reads`` (which rows a
program looks at), ``tables`` (all programs on the device), ``rules`` (with ``rule_columns``) and ``encode`` (with ``layout``):
stages of their own, with tables of their own, for rule programs and whole dictionaries; ``fill`` (resident requests into all
these tables), ``step`` (a step's buffers and launches), ``readout`` (what a step did, on its way back), ``worker`` (all of it
behind the adapters), ``self_test*`` (at start); ``codes`` and ``kernel_*`` are Triton's part. What runs in a forward pass
neither allocates nor waits for the host: its grids, addresses and arguments are the same at every step, so it can be captured
in a CUDA graph, idle steps included.
"""
