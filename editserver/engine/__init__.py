"""The part of editserver that lives inside vLLM's processes.

Load time: ``splice`` (finds and arms decoder layers), ``op`` (the custom op in the compiled graph).
Per server: ``config``, ``bank`` (who owns which row slot), ``rows`` (the rows themselves, and the SAEs they come from).
Per step: ``resident`` (programs of the running requests as flat tables), ``plan`` (which token runs which program),
``kernel_cpu`` (the arithmetic), ``worker`` (ties them together). Core side: ``salt``. Borders: ``wire``, ``journal``.
Only ``compat`` knows vLLM's private modules.
"""
