"""What is measured, as data: scenarios, the loads they put on a system, and the goals.

A scenario is one shape of traffic: so many requests at once, prompts of so many tokens, so many generated ones. Its
loads say what the requests ask for. Every request of a load edits latents (or adds vectors, or runs rules) of its own, on
every token, so that nothing is shared and nothing is skipped. Each load runs against the same traffic on vLLM without
the plugin.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum

LAYERS = (10, 15, 20)
AT_15 = (15,)
D_MODEL = 576
WIDTHS = {"4k": 4608, "64k": 65_536, "topk": 4096}
"""Dictionaries: at every layer "4k" and "64k" (ReLU), "topk" (k = 64) at layer 15."""
K, TOP_K, N_BINS = 64, 8, 100

VANILLA, EDITSERVER, LENS, OLDER = "vanilla", "editserver", "vllm-lens", "vanilla-0.30"
SYSTEMS = {
    VANILLA: "vLLM without the plugin, torch.compile on: what everything is compared with",
    EDITSERVER: "the same vLLM with editserver, three layers armed",
    LENS: "vllm-lens 1.3.0 on vLLM 0.30, which it forces into eager mode (make bench-peers installs it)",
    OLDER: "vLLM 0.30 without vllm-lens, torch.compile on: what the older version is worth by itself",
}
"""Every system by name."""


class Group(StrEnum):
    """Which processes a scenario needs; those of one group live side by side."""

    ENGINE = "engine"
    NGRAM = "ngram"
    HTTP = "http"
    ADMISSION = "admission"


class Ask(StrEnum):
    """What the requests of a load ask for."""

    NOTHING = "nothing"
    LATENTS = "latents"
    VECTORS = "vectors"
    APP = "app"
    RULES_FLAG = "rules-flag"
    RULES_STEER = "rules-steer"
    INSPECT = "inspect"
    TOP_K = "top-k"


@dataclass(frozen=True)
class Load:
    """One kind of request.

    Attributes:
        id: in results and on the command line, unique within its scenario.
        title: one line for people.
        ask: what every request asks for.
        n: latents edited at each layer, or listed in an inspection, or read by APP.
        layers: where.
        dictionary: of which latents.
        amount: what an edit adds to an activation.
        goal: least acceptable median of vanilla / system (admission: most milliseconds).
        systems: which can do it at all.
    """

    id: str
    title: str
    ask: Ask
    n: int = 0
    layers: tuple[int, ...] = LAYERS
    dictionary: str = "4k"
    amount: float = 0.05
    goal: float | None = None
    systems: tuple[str, ...] = (EDITSERVER,)


@dataclass(frozen=True)
class Scenario:
    """One shape of traffic and its loads.

    Attributes:
        short: in front of a load, where there is no room for ``title``.
        concurrency: requests on their way at once; 0: all.
        repeats: how often a prompt says the same, so that a draft of what comes next is mostly right, edited or not.
        quantity: "throughput", "step" (the median time of a decoding step of a run) or "ttft": what the ratios are of.
        times: how many rounds of it count as one; runs that are short are worth little each.
        default: whether a run without ``--cases`` measures it.
    """

    id: str
    short: str
    title: str
    group: Group
    n_requests: int
    prompt_len: int
    max_tokens: int
    loads: tuple[Load, ...]
    concurrency: int = 0
    repeats: int = 1
    quantity: str = "throughput"
    times: int = 1
    default: bool = True

    @property
    def tokens(self) -> int:
        """What tokens per second count: generated ones, or prompt tokens where there are more of them."""
        return self.n_requests * max(self.prompt_len, self.max_tokens)

    def smaller(self) -> Scenario:
        """The same scenario for a run that only shows that everything works."""
        return replace(
            self,
            title=f"{self.title} (in small)",
            loads=tuple(replace(load, goal=None) for load in self.loads),
            times=1,
            n_requests=min(self.n_requests, 16),
            prompt_len=min(self.prompt_len, 128),
            max_tokens=min(self.max_tokens, 8),
        )


TTFT_GOAL = 1 / 1.03
"""Time to first token at most 3 % above vanilla."""

PEERS = (EDITSERVER, LENS)
IDLE = Load("idle", "no request edits", Ask.NOTHING, goal=0.99, systems=(EDITSERVER, LENS, OLDER))
EIGHT = Load("8", "8 latents on 3 layers each", Ask.LATENTS, 8)
UNDISTURBING = replace(EIGHT, amount=1e-6)
"""Edited in every respect, but hardly changing the text: speculation is then right about as often as without."""

AIMED = (
    IDLE,
    Load("1", "1 latent on 3 layers each", Ask.LATENTS, 1, goal=0.99),
    replace(EIGHT, goal=0.97),
    Load("32", "32 latents on 3 layers each", Ask.LATENTS, 32, goal=0.95),
    Load("inspect", "8 features inspected at 1 layer", Ask.INSPECT, 8, AT_15, goal=0.97),
)
"""Goals of decoding."""

_ALL = (
    Scenario(
        "step",
        "a step of 16 requests",
        "a decoding step of 16 requests: the median of 14, next to as many of vanilla's",
        Group.ENGINE,
        16,
        32,
        16,
        tuple(replace(load, systems=(EDITSERVER,)) for load in AIMED),
        quantity="step",
        times=8,
    ),
    Scenario(
        "decode",
        "16 requests",
        "16 requests, 32 prompt and 48 generated tokens each",
        Group.ENGINE,
        16,
        32,
        48,
        (
            *AIMED,
            Load("vector", "a steering vector on 3 layers each", Ask.VECTORS, 1, systems=PEERS),
            Load("app", "APP on a 50-latent concept each", Ask.APP, 50, AT_15),
            Load("rules", "8 propositions and 16 rules each", Ask.RULES_FLAG, 0, AT_15),
            Load("rules-steer", "the same rules, one conclusion steers", Ask.RULES_STEER, 0, AT_15),
        ),
    ),
    Scenario(
        "256",
        "256 requests",
        "256 requests, 256 configurations, 16 prompt and 16 generated tokens each",
        Group.ENGINE,
        256,
        16,
        16,
        (replace(EIGHT, goal=0.95),),
    ),
    Scenario(
        "prompt",
        "8 prompts of 512 tokens",
        "8 prompts of 512 tokens, 4 generated tokens each",
        Group.ENGINE,
        8,
        512,
        4,
        (replace(EIGHT, goal=0.97),),
    ),
    Scenario(
        "ngram",
        "n-gram speculation",
        "16 requests with n-gram speculation (4 drafts), prompts that repeat 8 tokens 4 times, 48 generated tokens each",
        Group.NGRAM,
        16,
        33,
        48,
        (replace(IDLE, systems=(EDITSERVER,), goal=None), UNDISTURBING),
        repeats=4,
    ),
    Scenario(
        "http",
        "HTTP, 16 streams",
        "16 requests over HTTP, 32 prompt and 48 generated tokens each, streamed",
        Group.HTTP,
        16,
        32,
        48,
        (replace(IDLE, systems=(EDITSERVER,), goal=None), EIGHT),
    ),
    Scenario(
        "ttft",
        "first token, 1 request of 128",
        "time to first token over HTTP, one request of 128 tokens at a time",
        Group.HTTP,
        12,
        128,
        2,
        (replace(IDLE, systems=(EDITSERVER,), goal=TTFT_GOAL), replace(EIGHT, goal=TTFT_GOAL)),
        concurrency=1,
        quantity="ttft",
    ),
    Scenario(
        "ttft-16",
        "first token, 16 requests of 128",
        "time to first token over HTTP, 16 requests of 128 tokens at once",
        Group.HTTP,
        16,
        128,
        2,
        (replace(IDLE, systems=(EDITSERVER,), goal=TTFT_GOAL), replace(EIGHT, goal=TTFT_GOAL)),
        quantity="ttft",
    ),
    Scenario(
        "admission",
        "admission of 64 rows",
        "admission of one request with 64 rows: core and worker, beyond a plain request",
        Group.ADMISSION,
        100,
        32,
        1,
        (Load("64-rows", "64 latents at 1 layer, rows not yet in the bank", Ask.LATENTS, 64, AT_15, goal=1.0),),
        concurrency=1,
        quantity="milliseconds",
    ),
    Scenario(
        "64",
        "64 requests",
        "64 requests, 64 configurations, 32 prompt and 32 generated tokens each",
        Group.ENGINE,
        64,
        32,
        32,
        (EIGHT,),
        default=False,
    ),
    Scenario(
        "width",
        "wide dictionaries",
        "16 requests, dictionaries of 4,608 and of 65,536 latents",
        Group.ENGINE,
        16,
        32,
        64,
        (
            replace(EIGHT, id="4k", title="8 latents of 4,608 on 3 layers"),
            replace(EIGHT, id="64k", title="8 latents of 65,536 on 3 layers", dictionary="64k"),
        ),
        default=False,
    ),
    Scenario(
        "topk",
        "TopK",
        "16 requests on a TopK dictionary (k = 64), whose every latent is computed for every edited token",
        Group.ENGINE,
        16,
        32,
        64,
        (
            Load("relu", "1 latent of ReLU 4k on 1 layer", Ask.LATENTS, 1, AT_15),
            Load("topk", "1 latent of TopK 4k on 1 layer (full encode)", Ask.LATENTS, 1, AT_15, "topk"),
            Load("top-k", "inspect top_k of TopK 4k on 1 layer (full encode)", Ask.TOP_K, 0, AT_15, "topk"),
        ),
        default=False,
    ),
    Scenario(
        "topk-prompt",
        "TopK, 16 prompts of 512 tokens",
        "16 prompts of 512 tokens on a TopK dictionary (k = 64)",
        Group.ENGINE,
        16,
        512,
        4,
        (
            Load("relu", "1 latent of ReLU 4k on 1 layer", Ask.LATENTS, 1, AT_15),
            Load("topk", "1 latent of TopK 4k on 1 layer (full encode)", Ask.LATENTS, 1, AT_15, "topk"),
        ),
        default=False,
    ),
)

SCENARIOS = {scenario.id: scenario for scenario in _ALL}
"""Every scenario by id."""
