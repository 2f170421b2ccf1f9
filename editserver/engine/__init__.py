"""The part of editserver that lives inside vLLM's processes.

Load time: ``splice`` (finds and arms decoder layers), ``op`` (the custom op in the compiled graph).
Per server: ``config``, ``bank`` (who owns which row slot), ``rows`` (the rows themselves), ``dictionaries`` (SAEs).
Per step: ``resident`` (programs of the running requests as flat tables), ``plan`` (which token runs which program),
``kernel`` (the arithmetic), ``worker`` (ties them together). Core side: ``salt``, ``ledger``. Borders: ``wire``, ``journal``.
Only ``compat`` knows vLLM's private modules.
"""
