"""A label from evidence, without a language model: the same evidence always gives the same words.

``"Paris"``                               it fires on one form
``"of course"``                           … after one other
``"the" near court, judge``               … that is too common to say enough
``"-ing": walking, talking``              … that is a part of words
``comma "," near red, blue``              … that is a sign
``musical instrument: violin, piano``     it fires on words of one WordNet class
``years: 1961, 1958``, ``names: Mary, John``
``harbour, sail, ship``                   it fires on these words above others
``… → says Paris, France``                and its direction promotes these tokens clearly
``code: …``, ``dense: …``                 where it fires, how often
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from .topics import Topic

LONGEST = 60
MIN_FIRES = 3
DENSE = 0.1
ONE_FORM = 0.55
"""Share of the activation mass that makes one form (one preceding token, one class of numbers …) the label."""
CLEAR = 6.0
"""Standard deviations above the vocabulary's mean at which a promoted token is worth naming; chance reaches about 4."""
COMMON = 1e-3
"""Share of the corpus from which on a word alone says too little."""

_SIGNS = {
    ",": "comma", ".": "full stop", ":": "colon", ";": "semicolon", "?": "question mark", "!": "exclamation mark",
    '"': "quotation mark", "'": "apostrophe", "(": "opening bracket", ")": "closing bracket", "-": "hyphen",
    "--": "dash", "\n": "line break", "\n\n": "blank line", "_": "underscore", "=": "equals sign", "*": "asterisk",
    "�": "part of a character",
}  # fmt: skip
"""Names for what cannot be searched for."""
_ENDINGS = re.compile(r"(?:ings?|edly|ed|ly|es|e|s|er|ers|'s)$")
_YEAR = re.compile(r"(1[0-9]|20)\d\d")
_BEGINS_WORD = re.compile(r" [^\W\d_]{2,}")


@dataclass(frozen=True)
class Use:
    """How much of a feature's activation mass a form (a token or a word) has, and its share of the corpus."""

    text: str
    share: float
    corpus: float
    proper: bool = False
    """A word that is written with a capital as a rule."""

    @property
    def lift(self) -> float:
        return self.share / max(self.corpus, 1e-6)

    @property
    def weight(self) -> float:
        """How much it says about the feature: share × log lift."""
        return self.share * math.log(max(self.lift, 1.0) + 1e-9)


@dataclass(frozen=True)
class Evidence:
    """What a label is made from; shares are of activation mass, lists are heaviest first.

    Attributes:
        fires: tokens it fired on. density: their share of the tokens judged.
        tokens, words: forms it fires on; ``words`` most characteristic first.
        before: (token before the strongest places, share of them).
        nearby: words typical for the surroundings of those places.
        early: share on the first tokens of a text.
        code: whether it fires in source code above all.
        special: texts of the tokenizer's special tokens.
        promoted: (token, weight in standard deviations over the vocabulary).
    """

    fires: int
    density: float
    tokens: Sequence[Use] = ()
    words: Sequence[Use] = ()
    before: Sequence[tuple[str, float]] = ()
    nearby: Sequence[str] = ()
    early: float = 0.0
    code: bool = False
    special: frozenset[str] = frozenset()
    promoted: Sequence[tuple[str, float]] = ()
    topics: Sequence[Topic] = ()


def label(evidence: Evidence) -> str | None:
    """The label, at most ``LONGEST`` characters; None if nothing clear can be said."""
    core = _core(evidence) if evidence.fires >= MIN_FIRES else None
    prefix = ""
    if core is not None:
        prefix = "dense: " if evidence.density > DENSE else "code: " if evidence.code else ""
    text = clipped(shown(f"{prefix}{core or ''}"))
    says = says_clearly(evidence.promoted, text)
    for count in range(len(says), 0, -1):
        longer = f"{text} → says {', '.join(says[:count])}".strip()
        if len(longer) <= LONGEST:
            return longer
    return text or None


def _core(evidence: Evidence) -> str | None:
    describe: tuple[Callable[[Evidence], str | None], ...] = (
        _template, _start, _one_form, _numbers, _topic, _names, _affix, _word_list,
    )  # fmt: skip
    return next((found for rule in describe if (found := rule(evidence)) is not None), None)


def _template(evidence: Evidence) -> str | None:
    """The chat template's own tokens, and what stands right behind them."""
    own = [use for use in evidence.tokens if use.text in evidence.special]
    if sum(use.share for use in own) >= ONE_FORM:
        return _fitted(shown(use.text) for use in own if use.share > 0.1)
    for text, share in evidence.before[:1]:
        if text in evidence.special and share >= ONE_FORM:
            return _fitted((shown(use.text) for use in evidence.tokens[:3] if use.share > 0.1), f"after {text}: ")
    return None


def _start(evidence: Evidence) -> str | None:
    return _fitted(_texts(evidence.words[:3]), "start of a text: ") if evidence.early >= 0.7 else None


def _one_form(evidence: Evidence) -> str | None:
    forms = _forms(evidence.tokens)
    if not forms or forms[0].share < ONE_FORM:
        return None
    form = forms[0]
    text = form.text.strip() or form.text
    part_of = [use for use in evidence.words if fold(use.text) != fold(text) and fold(text) in fold(use.text)]
    if sum(use.share for use in part_of) > 0.5 * form.share:
        # The token is a part of words: one of them, or an ending or a beginning of many.
        whole = _forms(evidence.words)
        if whole and whole[0].share >= 0.7 * form.share:
            return f'"{shown(whole[0].text)}"'
        ends = sum(use.share for use in part_of if fold(use.text).endswith(fold(text)))
        affix = f"-{text}" if ends >= 0.5 * sum(use.share for use in part_of) else f"{text}-"
        return _fitted(_texts(part_of[:3]), f'"{affix}": ')
    quoted = f'"{shown(text)}"'
    if text in _SIGNS:
        sign = f"{_SIGNS[text]} {quoted}" if text.isprintable() and text not in '"�' else _SIGNS[text]
        return _fitted(evidence.nearby[:2], f"{sign} near ")
    if evidence.before and evidence.before[0][1] >= ONE_FORM and evidence.before[0][0].strip():
        return f'"{shown((evidence.before[0][0] + form.text).strip())}"'
    if form.corpus >= COMMON and evidence.nearby:
        return _fitted(evidence.nearby[:3], f"{quoted} near ")
    return quoted


def _numbers(evidence: Evidence) -> str | None:
    digits = [use for use in evidence.words if use.text[:1].isdigit()]
    if _part(digits, evidence.words) < ONE_FORM:
        return None
    years = [use for use in digits if _YEAR.fullmatch(use.text)]
    if _part(years, digits) >= 0.6:
        return _fitted(_texts(years[:3]), "years: ")
    if evidence.nearby:
        return _fitted(evidence.nearby[:2], f"numbers ({_fitted(_texts(digits[:2]))}) near ")
    return _fitted(_texts(digits[:3]), "numbers: ")


def _topic(evidence: Evidence) -> str | None:
    if not evidence.topics:
        return None
    name = evidence.topics[0].name
    return _fitted([text for text in _texts(_telling(evidence)) if stem(text) != stem(name)][:3], f"{name}: ")


def _names(evidence: Evidence) -> str | None:
    proper = [use for use in evidence.words if use.proper]
    if _part(proper, evidence.words) < 0.6 or len(proper) < 4:
        return None
    return _fitted(_texts(proper[:4]), "names: ")


def _affix(evidence: Evidence) -> str | None:
    """A common ending or beginning of words that are otherwise unlike."""
    words = [use for use in evidence.words if use.text.isalpha() and len(use.text) >= 3]
    for ends in (True, False):
        for length in (4, 3, 2, 1):
            groups: dict[str, list[Use]] = {}
            for use in words:
                if len(use.text) > length:
                    text = use.text.lower()
                    groups.setdefault(text[-length:] if ends else text[:length], []).append(use)
            for affix, members in groups.items():
                masses: dict[str, float] = {}
                for use in members:
                    masses[stem(use.text)] = masses.get(stem(use.text), 0.0) + use.share
                varied = len(masses) >= 6 and max(masses.values()) < 0.3 * sum(masses.values())
                # One letter is shared by chance by a tenth of all words.
                if varied and _part(members, words) >= (0.6 if length > 1 else 0.7):
                    return _fitted(_texts(members)[:3], f'"-{affix}": ' if ends else f'"{affix}-": ')
    return None


def _word_list(evidence: Evidence) -> str | None:
    signs = [use for use in _forms(evidence.tokens) if not any(c.isalnum() for c in use.text)]
    if sum(use.share for use in signs) >= ONE_FORM:
        return _fitted((_SIGNS.get(use.text.strip(" "), shown(use.text)) for use in signs[:3]), "signs: ")
    return _fitted(_texts(_telling(evidence))[:4]) or None


def _telling(evidence: Evidence) -> list[Use]:
    """The words that tell a feature from others: far more common under it than elsewhere, and not too far behind the first.

    ``evidence.words`` come in the order of ``Use.weight``, which this is about.
    """
    words = [use for use in evidence.words if use.text[:1].isalnum()]
    rare = [use for use in words if use.lift >= 3.0] or words[:4]
    return [use for use in rare if use.weight >= 0.15 * rare[0].weight][:8]


def _part(some: Iterable[Use], of: Iterable[Use]) -> float:
    """Share of the mass of ``of`` that ``some`` have."""
    return sum(use.share for use in some) / max(sum(use.share for use in of), 1e-12)


def says_clearly(promoted: Sequence[tuple[str, float]], label_so_far: str = "") -> list[str]:
    """Up to three promoted words worth naming: far above chance, or several of one stem; not those already named.

    Only tokens that begin a word count: the others are rare pieces that many directions promote a little.
    """
    whole = [(token.strip(), weight) for token, weight in promoted if _BEGINS_WORD.fullmatch(token)]
    if not whole:
        return []
    best = whole[0][1]
    stems = [stem(token) for token, _ in whole[:6]]
    akin = max((stems.count(one) for one in stems), default=0) >= 2 and best >= 0.75 * CLEAR
    if best < CLEAR and not akin:
        return []
    named = {stem(word) for word in re.findall(r"\w+", label_so_far)}
    chosen: list[str] = []
    for token, weight in whole:
        if weight < 0.7 * best or len(chosen) == 3:
            break
        if stem(token) not in named | {stem(other) for other in chosen}:
            chosen.append(token)
    return chosen


def stem(word: str) -> str:
    """A crude stem, by which "look", "looked" and "looking" are one word in a list."""
    folded = word.strip().lower()
    return _ENDINGS.sub("", folded) if len(folded) > 4 else folded


def fold(text: str) -> str:
    """What spellings of one word have in common: case, spaces around it, a plural's s."""
    folded = text.strip().lower()
    return folded[:-1] if len(folded) > 3 and folded.endswith("s") and not folded.endswith("ss") else folded


def _forms(uses: Sequence[Use]) -> list[Use]:
    """Uses with the spellings of one form put together, under the heaviest spelling."""
    forms: dict[str, Use] = {}
    for use in uses:
        key = fold(use.text) or use.text
        known = forms.get(key)
        forms[key] = (
            use if known is None else Use(known.text, known.share + use.share, known.corpus + use.corpus, known.proper)
        )
    return sorted(forms.values(), key=lambda use: -use.share)


def _texts(uses: Iterable[Use]) -> list[str]:
    """Texts, one spelling of each word, in order."""
    first: dict[str, str] = {}
    for use in uses:
        first.setdefault(stem(use.text), use.text)
    return [shown(text) for text in first.values()]


def shown(text: str) -> str:
    """Text for a label: white space and what cannot be printed written out."""
    named = {"\n": "\\n", "\t": "\\t"}
    return "".join(named.get(c, c if c.isprintable() else "�") for c in text)


def _fitted(texts: Iterable[str], head: str = "") -> str:
    """``head`` and as many texts as fit, at least one."""
    line = ""
    for text in texts:
        longer = f"{line}, {text}" if line else f"{head}{text}"
        if line and len(longer) > LONGEST:
            break
        line = longer
    return clipped(line or head.rstrip().removesuffix(":").removesuffix(" near"))


def clipped(line: str) -> str:
    """At most ``LONGEST`` characters."""
    return line if len(line) <= LONGEST else line[: LONGEST - 1] + "…"
