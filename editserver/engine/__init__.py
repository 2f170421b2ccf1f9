"""The part of editserver that lives inside vLLM's processes.

Load time: ``plugin`` (the way in), ``splice`` (finds and arms decoder layers), ``op`` (the custom op in the compiled graph),
``choose`` (which engine edits), ``warm_up``, ``frames`` (room for Python's).
Per server: ``config``, ``memory`` (what is kept, in bytes), ``bank`` (who owns which row slot), ``rows`` (the rows themselves, and
the SAEs they come from), ``abilities`` (what a device's engine can do).
Per request: ``resident`` (who is there), ``layer_table``, ``selector_table``, ``read_table``, ``rule_table`` (what they ask for, as
flat tables; ``stack`` holds them), ``history`` (its tokens, for mentions).
Per step: ``batch`` (what a model runner hands over), ``plan`` (which token runs which program; ``kernel_plan``), ``decode`` (the
same for steps that go on as the one before), ``gates`` and ``rules`` (what is open where; ``kernel_rules``), ``full_encode``
(what needs whole dictionaries), ``native`` (what the op does without Python), ``kernel_cpu`` (the arithmetic), ``outcome`` (what
it did).
``engine`` is what all this looks like from outside: ``worker`` is it on a CPU, ``triton`` on a device.
Core side: ``salt``. Borders: ``wire``, ``journal`` and ``trace`` (what a request's receipts are made of).
Only ``compat`` knows vLLM's private modules.
"""
