"""Conversations for training: our own prompts, answered by the model itself.

An instruct model's residual stream at role markers and inside its own answers looks unlike its stream on prose, so
roughly a third of the training tokens are conversations in the model's chat format.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

Message = dict[str, str]

SYSTEMS = (
    "You are a helpful AI assistant.",
    "You are a friendly teacher. Explain things simply.",
    "You are a pirate. Answer in character.",
    "You are an expert cook who loves giving advice.",
    "You are a poet. Answer with feeling.",
    "You are a careful scientist. Be precise and brief.",
    "You are a historian. Give dates and names.",
    "You are a travel guide.",
    "You are a doctor. Be kind and clear.",
    "You are a software engineer. Show code when it helps.",
    "You are a sports reporter.",
    "You are a storyteller for children.",
    "Answer in one sentence.",
    "Answer as a numbered list.",
    "Reply politely and formally.",
)

# {a} and {b} are topics, {p} is a passage of prose, {n} and {m} are small numbers.
TEMPLATES = (
    "What is {a}?",
    "What does the word '{a}' mean?",
    "Explain {a} to a child.",
    "Write a short story about {a}.",
    "Write a poem about {a} and {b}.",
    "Give me five facts about {a}.",
    "How are {a} and {b} different?",
    "Tell me a joke about {a}.",
    "Write a letter to a friend about {a}.",
    "Write an email to my boss about {a}.",
    "Why is {a} important?",
    "What is the history of {a}?",
    "Give me advice about {a}.",
    "List three pros and cons of {a}.",
    "Write a news report about {a}.",
    "Describe {a} using all five senses.",
    "Make up a conversation between {a} and {b}.",
    "I feel sad about {a}. What should I do?",
    "I am so happy about {a}!",
    "Write a Python function about {a}.",
    "Write a recipe that uses {a}.",
    "Plan a day trip that includes {a}.",
    "Translate '{a}' into French and Spanish.",
    "What is {n} plus {m}?",
    "I have {n} apples and buy {m} more. How many do I have?",
    "Sort these words: {a}, {b}, {n} dogs.",
    "Use '{a}' and '{b}' in one sentence.",
    "Who is famous for {a}?",
    "Where in the world can I find {a}?",
    "Ask me three questions about {a}.",
    "Summarize this text:\n\n{p}",
    "Continue this text:\n\n{p}",
    "Rewrite this in simple words:\n\n{p}",
    "What is the main idea of this passage?\n\n{p}",
    "Who is mentioned in this passage?\n\n{p}",
    "Is the tone of this passage positive or negative?\n\n{p}",
    "{p}\n\nWhat do you think about this?",
)

SMALL_TALK = (
    "Hello!",
    "Hi, how are you?",
    "Tell me about your day.",
    "What can you do?",
    "What is your name?",
    "Who made you?",
    "Thank you very much.",
    "Good morning!",
    "I'm bored. Entertain me.",
    "What is your favorite color?",
    "Can you help me with something?",
    "Tell me something interesting.",
    "What should I eat tonight?",
    "What should I do this weekend?",
    "Do you like music?",
    "Are you a human?",
    "Goodbye!",
)

FOLLOW_UPS = (
    "Thanks! Can you say more?",
    "Why?",
    "Make it shorter.",
    "Give me an example.",
    "Are you sure?",
    "Now say it like a pirate.",
    "What would you recommend?",
    "That is great, thank you.",
)


def prompts(topics: Sequence[str], passages: Sequence[str], count: int, seed: int = 0) -> list[list[Message]]:
    """``count`` conversations that end with a user turn, deterministic in ``seed``.

    About 45 % state a system prompt; the others leave it to the chat template, which puts in the model's own.
    """
    rng = random.Random(seed)
    made = []
    for _ in range(count):
        if rng.random() < 0.04:
            user = rng.choice(SMALL_TALK)
        else:
            user = rng.choice(TEMPLATES).format(
                a=rng.choice(topics),
                b=rng.choice(topics),
                p=rng.choice(passages),
                n=rng.randint(2, 99),
                m=rng.randint(2, 99),
            )
        messages = [{"role": "user", "content": user}]
        if rng.random() < 0.45:
            messages.insert(0, {"role": "system", "content": rng.choice(SYSTEMS)})
        made.append(messages)
    return made


def follow_up(conversation: list[Message], rng: random.Random) -> list[Message]:
    """The conversation with one more user turn."""
    return [*conversation, {"role": "user", "content": rng.choice(FOLLOW_UPS)}]


@torch.inference_mode()
def answer(
    model: Any, tokenizer: Any, conversations: Sequence[list[Message]], max_new_tokens: int, seed: int
) -> list[list[Message]]:
    """Each conversation with the model's own sampled answer appended (temperature 0.8, top-p 0.95), as one batch."""
    texts = [tokenizer.apply_chat_template(c, add_generation_prompt=True, tokenize=False) for c in conversations]
    batch = tokenizer(texts, return_tensors="pt", padding=True, padding_side="left")
    torch.manual_seed(seed)
    output = model.generate(
        **batch, do_sample=True, temperature=0.8, top_p=0.95, top_k=0, max_new_tokens=max_new_tokens
    )
    answers = tokenizer.batch_decode(output[:, batch.input_ids.shape[1] :], skip_special_tokens=True)
    return [[*c, {"role": "assistant", "content": a}] for c, a in zip(conversations, answers, strict=True)]


def generate(
    model: Any,
    tokenizer: Any,
    conversations: Sequence[list[Message]],
    path: Path,
    *,
    batch: int = 96,
    max_new_tokens: int = 96,
    report: Callable[[int, int, float], None] = lambda done, total, seconds: None,
) -> None:
    """Answer all conversations into a JSON-lines file, resuming after the lines that are already there.

    A quarter of the batches get a second turn. Prompts of similar length share a batch, so that little is padding.
    ``report`` is called with (answered, total, seconds since the start).
    """
    lengths = [sum(len(message["content"]) for message in c) for c in conversations]
    order = sorted(range(len(conversations)), key=lambda i: lengths[i])
    batches = [order[start : start + batch] for start in range(0, len(order), batch)]
    random.Random(0).shuffle(batches)  # a run cut short still has prompts of every length
    done = sum(1 for _ in read(path))
    started = time.monotonic()
    seen = 0
    with path.open("a") as file:
        for number, members in enumerate(batches):
            seen += len(members)
            if seen <= done:
                continue
            answered = answer(model, tokenizer, [conversations[i] for i in members], max_new_tokens, seed=number)
            if number % 4 == 0:
                rng = random.Random(number)
                turns = [follow_up(c, rng) for c in answered]
                answered = answer(model, tokenizer, turns, max_new_tokens, seed=number)
            file.write("".join(json.dumps(c) + "\n" for c in answered))
            file.flush()
            report(seen, len(conversations), time.monotonic() - started)


def read(path: Path) -> Iterator[list[Message]]:
    """The conversations of a JSON-lines file; nothing if it does not exist."""
    if path.exists():
        for line in path.read_text().splitlines():
            yield json.loads(line)
