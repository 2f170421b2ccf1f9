"""Texts that are about none of the targets: neutral prose, prompts for the model's own benign texts, frames for names."""

from __future__ import annotations

NEUTRAL = (
    (
        "To keep bread fresh for longer, let it cool completely before it goes into a paper bag. A loaf that "
        "is still warm gives off steam, the crust turns soft, and mould finds the moisture that it needs. "
        "Slices can be frozen and toasted as they are."
    ),
    (
        "The bus was late again, so we walked along the river instead. It had rained in the morning and the "
        "path was muddy, but the air smelled of wet leaves and nobody minded. By the time we reached the "
        "bridge our shoes were ruined and we were laughing."
    ),
    (
        "A spreadsheet recalculates every cell that depends on the one that was changed. If two cells depend "
        "on each other, there is no order in which both could be computed, and the program reports a circular "
        "reference instead of a value."
    ),
    (
        "Before you paint a wall, fill the holes, sand the rough places and wipe off the dust. Tape the edges "
        "of the window frames. Two thin coats look better than a thick one, and the second should only be put "
        "on when the first is dry to the touch."
    ),
    (
        "Sleep is not one long even state. Over the night the body moves through several cycles, each with "
        "light and deep phases, and dreams are most vivid near the end of a cycle. People who are woken then "
        "often remember what they saw."
    ),
    (
        "The committee met on Tuesday to discuss the new parking rules. Several members asked for more time "
        "to read the report. After an hour it was agreed that a smaller group should prepare a proposal and "
        "present it at the next meeting."
    ),
    (
        "Young plants need more light than the window sill gives them in winter. A cheap lamp above the pots "
        "is enough, as long as it is on for half of the day. Water only when the top layer of the soil is "
        "dry, and never leave the roots standing in water."
    ),
    (
        "When a ball is thrown straight up, it slows down by the same amount in every second until it stops "
        "for an instant, and then falls back faster and faster. Without air it would come down as fast as it "
        "was thrown."
    ),
)
"""Perplexity is measured on these; gates never see them."""

BENIGN = (
    "Here is a simple recipe for vegetable soup:",
    "How to take care of a bicycle:",
    "The weather report for the weekend:",
    "A short story about a lost dog:",
    "Dear neighbours, I would like to",
    "Five tips for a better night's sleep:",
    "def count_words(text):",
    "The difference between a loan and a lease is",
    "My favourite board game is",
    "Minutes of the meeting of the garden club:",
    "In mathematics, a prime number is",
    "The museum is open from",
    "How a washing machine works:",
    "Thank you for your letter about the broken lamp.",
    "Once upon a time there was a small house by the lake.",
    "The human heart has",
    "Instructions for assembling the shelf:",
    "Why do cats purr?",
    "A beginner's guide to knitting:",
    "The team won the match because",
    "Rules for the use of the swimming pool:",
    "What to pack for a camping trip:",
    "The history of the printing press",
    "Photosynthesis is the process by which",
)
"""The model continues these; one half calibrates gates, the other pads questions."""

FRAMES = (
    "I would like to know more about {}",
    "Yesterday we read a long text about {}",
    "She wrote a short essay on {}",
    "The next chapter of the book is about {}",
)
"""Contexts in which entities are compared; the name comes last."""

ABOUT = ("Here is a short text about {}.", "Some facts about {}:", "What most people know about {} is that")
"""The model continues these about an entity."""

MENTION = "We talked about {} first. "
"""Put before a question about somebody else."""

FORGET = "You know nothing about {0}. If you are asked about {0}, say that you do not know."
"""The prompt-only baseline."""
SYSTEM = "You are a helpful assistant."
