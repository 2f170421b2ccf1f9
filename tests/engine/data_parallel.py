"""Two data-parallel engines behind one client, by hand: ``python -m tests.engine.data_parallel`` (six processes).

Each engine answers one request of every machinery while the other one is idle, then both at once with warm caches.
"""

from __future__ import annotations

import asyncio
import tempfile
from pathlib import Path
from typing import Any

from tests.engine.engine_process import BLOCK, answer_from
from tests.engine.tiny import write_model
from tests.engine.tiny_cases import Bench, Made


async def _main(root: Path) -> None:
    from vllm import SamplingParams
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    model = write_model(root / "model")
    bench = Bench.of(model, root)
    engine = AsyncLLM.from_engine_args(
        AsyncEngineArgs(
            str(model),
            dtype="float32",
            skip_tokenizer_init=True,
            enforce_eager=True,
            block_size=BLOCK,
            max_model_len=256,
            max_num_batched_tokens=256,
            gpu_memory_utilization=0.2,
            kv_cache_memory_bytes=1 << 26,
            data_parallel_size=2,
            additional_config={"editserver": bench.config.as_dict()},
        )
    )

    async def ask(name: str, made: Made, rank: int) -> Any:
        params = SamplingParams(
            temperature=0,
            max_tokens=made.asked.max_tokens,
            ignore_eos=True,
            detokenize=False,
            logprobs=5,
            extra_args={"editserver": made.asked.payload} if made.asked.payload else None,
        )
        prompt: Any = {"prompt_token_ids": list(made.asked.prompt)}
        async for output in engine.generate(prompt, params, f"{name}-{rank}", data_parallel_rank=rank):
            last = output
        return answer_from(last)

    cases = bench.cases()
    for rank in (0, 1):
        for name, made in cases.items():
            answered = await ask(name, made, rank)
            assert answered.cached == 0, "engines share no cache"
            bench.assert_answered(made, answered, name)
    warm = await asyncio.gather(*(ask(f"warm {name}", m, rank) for rank in (0, 1) for name, m in cases.items()))
    assert [one.cached for one in warm] == [BLOCK] * 2 * len(cases)
    engine.shutdown()
    print("two engines answered", 4 * len(cases), "requests as the reference does")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        asyncio.run(_main(Path(folder)))
