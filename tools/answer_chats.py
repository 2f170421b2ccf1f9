"""Let vLLM answer the training conversations: `sae train` can do it with transformers, ten times slower.

    python tools/answer_chats.py OUT.jsonl --count 1500 --seed 11
    editserver sae train ... --chats OUT.jsonl

Every prompt and every answer is sampled anew on each run (vLLM on a CPU cannot seed a chunked prefill), so the file is
kept with the activations; the dictionary's card says how many conversations went in.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import time
from pathlib import Path

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")
os.environ["VLLM_PLUGINS"] = ""  # plain vLLM: these answers are the model's own
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")


def main() -> None:
    """Answer ``--count`` conversations, appending them to the file as batches finish."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="JSON lines, one conversation each; appended to")
    parser.add_argument("--count", type=int, default=1500, help="conversations to answer")
    parser.add_argument("--seed", type=int, default=0, help="of the prompts")
    parser.add_argument("--batch", type=int, default=128, help="conversations at a time")
    parser.add_argument(
        "--cache", type=Path, default=Path("~/.cache/editserver/training"), help="for the text packages"
    )
    options = parser.parse_args()

    from vllm import LLM, SamplingParams

    from editserver.demo.model import ensure_demo_model
    from sae_weights.training import chats, corpus

    cache = options.cache.expanduser()
    cache.mkdir(parents=True, exist_ok=True)
    prompts = chats.prompts(*corpus.topics(cache), options.count, seed=options.seed)
    llm = LLM(str(ensure_demo_model()), gpu_memory_utilization=0.3, max_model_len=1024, max_num_seqs=options.batch)
    sampling = SamplingParams(temperature=0.8, top_p=0.95, max_tokens=160)
    rng, started, tokens = random.Random(options.seed), time.monotonic(), 0

    def answer(conversations: list[list[chats.Message]]) -> list[list[chats.Message]]:
        nonlocal tokens
        outputs = llm.chat(conversations, sampling, use_tqdm=False)  # type: ignore[arg-type]
        tokens += sum(len(o.outputs[0].token_ids) for o in outputs)
        texts = [o.outputs[0].text for o in outputs]
        return [[*c, {"role": "assistant", "content": t}] for c, t in zip(conversations, texts, strict=True)]

    for number, start in enumerate(range(0, len(prompts), options.batch)):
        answered = answer(prompts[start : start + options.batch])
        if number % 3 == 0:
            answered = answer([chats.follow_up(c, rng) for c in answered])
        with options.out.open("a", encoding="utf-8") as file:
            file.write("".join(json.dumps(c) + "\n" for c in answered))
        print(
            f"{start + len(answered):>6} conversations  {tokens / (time.monotonic() - started):,.0f} tokens/s",
            flush=True,
        )


if __name__ == "__main__":
    main()
