"""A small engine proves that it edits: ``python -m editserver.cli.selftest`` (run by ``editserver doctor --selftest``)."""

from __future__ import annotations

import os
import sys
from typing import Any

LAYER = 15
STRENGTH = 1.5
MAX_TOKENS = 16
PROMPT = "The capital of France is"


def payload(d_model: int, seed: int = 0) -> Any:
    """A steering vector in units of the token's own norm, compiled."""
    import numpy as np

    from interventions.program import Channel, LayerProgram, Op, Payload, Program, ReadKind, vector_key
    from interventions.selectors import ALL

    vector = np.random.default_rng(seed).normal(size=d_model)
    row = (vector / np.linalg.norm(vector)).astype("<f4").tobytes()
    op = Op(1.0, STRENGTH, float("-inf"), float("inf"), False, 0, 0)
    layer = LayerProgram(LAYER, (Channel(ReadKind.NORM, vector_key(row), (op,)),))
    program = Program((layer,), (ALL,), {vector_key(row): row})
    return Payload(program, (), program.digest())


def main() -> int:
    """0 if the edit did what its record says and left plain requests alone; else 1, saying what went wrong."""
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    from vllm import LLM, SamplingParams

    from editserver.demo.model import ensure_demo_model
    from editserver.engine.config import EngineConfig
    from editserver.engine.wire import KEY

    llm = LLM(
        str(ensure_demo_model(progress=False)),
        enforce_eager=True,
        max_model_len=256,
        max_num_seqs=2,
        gpu_memory_utilization=0.3,
        additional_config={KEY: EngineConfig(armed=(LAYER,)).as_dict()},
    )
    program = payload(llm.llm_engine.model_config.get_hidden_size())

    def answer(extra: dict[str, Any] | None) -> Any:
        params = SamplingParams(temperature=0.0, max_tokens=MAX_TOKENS, ignore_eos=True, extra_args=extra)
        return llm.generate([PROMPT], params, use_tqdm=False)[0]

    plain, edited, again = answer(None), answer({KEY: program.to_bytes()}), answer(None)
    journal = getattr(edited.outputs[0], KEY, None)
    n_fed = len(edited.prompt_token_ids) + MAX_TOKENS - 1
    problems = []
    if journal is None or not journal.covers(0, n_fed):
        problems.append("the engine has no complete record of the edit")
    elif journal.stats(0, LAYER, n_fed).fired != n_fed - 1:
        problems.append(f"the edit fired on {journal.stats(0, LAYER, n_fed).fired} of {n_fed - 1} tokens")
    if edited.outputs[0].token_ids == plain.outputs[0].token_ids:
        problems.append("the edited answer equals the plain one")
    if again.outputs[0].token_ids != plain.outputs[0].token_ids:
        problems.append("a plain request after the edited one has another answer")
    print(
        "; ".join(problems) or f"edited {n_fed - 1} tokens at layer {LAYER}; plain answers before and after are equal"
    )
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
