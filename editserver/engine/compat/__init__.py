"""Everything that knows vLLM's private modules. A vLLM upgrade touches this folder and nothing else.

``version`` (which vLLM), ``refuse`` (configurations under which an edit could be wrong), ``signatures`` (what the
adapters rely on), ``core`` (engine core and output processor), ``load`` (model loading), ``v1_runner`` and
``v2_runner`` (the two families of model runners) over ``runner`` (what they have in common), ``parallel`` and ``pipeline``
(tensor and pipeline parallelism), ``handshake`` (a worker proves that it is armed), ``loops`` (room for the frames of a step).
"""
