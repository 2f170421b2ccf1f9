"""``editserver features …``: find features by words, look at one, and find those that separate two sets of texts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Protocol

import typer
from rich.console import Console, Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from editserver.cli.remote import (
    DEFAULT_URL,
    ApiKey,
    Json,
    MaybeUrl,
    Url,
    connected,
    fail,
    print_json,
    read_texts,
    working,
)
from interventions.wording import choices, nearest

app = typer.Typer(help="Features: search, show, contrast.", no_args_is_help=True, rich_markup_mode="rich")
console = Console()

_SHOWN_TOKENS = 10
_WARMTH = ((64, 48, 0), (255, 170, 0))
"""Background of a token with next to no activation, and of the strongest one."""

SEARCH_EXAMPLES = """[bold]Examples[/bold]

editserver features search music

editserver features search "court ruling" --sae smollm2-135m/l15 --limit 5

editserver features search music --url http://localhost:8000 --json
"""
SHOW_EXAMPLES = """[bold]Examples[/bold]

editserver features show smollm2-135m/l15 88

editserver features show smollm2-135m/l15 88 --contexts 3 --url http://localhost:8000
"""
CONTRAST_EXAMPLES = """[bold]Examples[/bold] (start a server first: editserver serve demo)

editserver features contrast --sae smollm2-135m/l15 --positive music.txt --negative finance.txt

editserver features contrast --sae smollm2-135m/l15 --positive "The violin solo was lovely." --positive "She sang a ballad."
--negative "The bond yield fell." --negative "Quarterly profits rose."

[bold]Then[/bold] look at the best one (editserver features show), and find how strongly to set it (editserver calibrate).
"""


class Source(Protocol):
    """Where feature knowledge comes from. What it returns has the form of the HTTP contract."""

    def search(self, sae: str, words: str, limit: int) -> list[dict[str, Any]]: ...

    def show(self, sae: str, index: int) -> dict[str, Any]: ...

    def ids(self) -> list[str]: ...


class Server:
    """A running server."""

    def __init__(self, client: Any) -> None:
        self._client = client

    def search(self, sae: str, words: str, limit: int) -> list[dict[str, Any]]:
        return [feature.model_dump() for feature in self._client.features(sae, words, limit=limit)]

    def show(self, sae: str, index: int) -> dict[str, Any]:
        card: dict[str, Any] = self._client.feature(sae, index).model_dump()
        return card

    def ids(self) -> list[str]:
        return [sae.id for sae in self._client.saes()]


class Files:
    """The files beside the bundled SAEs, or in a folder."""

    def search(self, sae: str, words: str, limit: int) -> list[dict[str, Any]]:
        with self._open(sae) as store:
            return [_item(found.feature) | {"score": found.score} for found in store.search(words, limit)]

    def show(self, sae: str, index: int) -> dict[str, Any]:
        with self._open(sae) as store:
            if not 0 <= index < store.n_features:
                fail(f"no feature {index}; {sae} has 0..{store.n_features - 1}")
            feature, labels = store.feature(index), store.labels()
        card: dict[str, Any] = _item(feature) | feature.details(labels)
        return card

    def ids(self) -> list[str]:
        from sae_weights.catalogue import bundled

        return [sae for sae in bundled() if self._path(sae).is_file()]

    @contextmanager
    def _open(self, sae: str) -> Iterator[Any]:
        from sae_weights.knowledge import KnowledgeError, KnowledgeStore

        try:
            with KnowledgeStore.open(self._path(sae)) as store:
                yield store
        except KnowledgeError as error:
            fail(str(error))

    @staticmethod
    def _path(sae: str) -> Path:
        from sae_weights.catalogue import BUNDLED_FOLDER, bundled
        from sae_weights.knowledge import FILE

        ids = bundled()
        if sae in ids:
            return BUNDLED_FOLDER / sae / FILE
        folder = Path(sae).expanduser()
        if not folder.is_dir():
            fail(f"no SAE {sae!r}: neither a folder nor one of {choices(ids)}.{nearest(sae, ids)}")
        return folder / FILE


@contextmanager
def _source(url: str | None, api_key: str | None) -> Iterator[Source]:
    if url is None:
        yield Files()
        return
    with connected(url, api_key) as client:
        yield Server(client)


def _item(feature: Any) -> dict[str, Any]:
    return {
        "index": feature.index,
        "label": feature.label,
        "density": feature.density,
        "max_activation": feature.max_activation,
    }


@app.command(epilog=SEARCH_EXAMPLES)
def search(
    words: Annotated[list[str], typer.Argument(help="What the feature is about.")],
    sae: Annotated[
        str | None, typer.Option(metavar="ID", help="Only this SAE: an id, or a folder. Default: all of them.")
    ] = None,
    limit: Annotated[int, typer.Option(min=1, max=1000, help="How many features.")] = 10,
    url: MaybeUrl = None,
    api_key: ApiKey = None,
    as_json: Json = False,
) -> None:
    """Find features by words of their labels, of the texts they fire on, and of the tokens they promote."""
    with _source(url, api_key) as source:
        ids = [sae] if sae is not None else source.ids()
        found = [{"sae": one} | item for one in ids for item in source.search(one, " ".join(words), limit)]
    best = sorted(found, key=lambda item: -(item["score"] or 0.0))[:limit]
    if as_json:
        print_json(best)
        return
    if not best:
        console.print(f"No feature of {choices(ids)} has to do with {' '.join(words)!r}.", highlight=False)
        raise typer.Exit(1)
    table = Table("SAE", "feature", "label", "score", "density", "max")
    for item in best:
        numbers = (_number(item["score"]), _percent(item["density"]), _number(item["max_activation"]))
        table.add_row(item["sae"], str(item["index"]), _label(item["label"]), *numbers)
    console.print(table)


@app.command(epilog=SHOW_EXAMPLES)
def show(
    sae: Annotated[str, typer.Argument(metavar="SAE", help="Its id, or a folder.")],
    index: Annotated[int, typer.Argument(metavar="INDEX", help="The feature's index.")],
    contexts: Annotated[int, typer.Option(min=0, help="How many contexts.")] = 8,
    url: MaybeUrl = None,
    api_key: ApiKey = None,
    as_json: Json = False,
) -> None:
    """Everything that is known about one feature: when it fires, what it promotes, what is near."""
    with _source(url, api_key) as source:
        card = source.show(sae, index)
    if as_json:
        print_json(card)
        return
    console.print(_card(sae, card, contexts))


@app.command(epilog=CONTRAST_EXAMPLES)
def contrast(
    sae: Annotated[str, typer.Option(metavar="ID", help="The served SAE.")],
    positive: Annotated[
        list[str],
        typer.Option(metavar="TEXT|FILE", help="A text that has it, or a file with one text per line. Repeatable."),
    ],
    negative: Annotated[list[str], typer.Option(metavar="TEXT|FILE", help="The same for texts that do not.")],
    limit: Annotated[int, typer.Option(min=1, max=1000, help="How many features.")] = 10,
    pool: Annotated[str | None, typer.Option(metavar="max|mean", help="A text's tokens as one number.")] = None,
    max_density: Annotated[
        float | None, typer.Option(metavar="X", help="Leave out what fires on a larger share of tokens; default 0.5.")
    ] = None,
    url: Url = DEFAULT_URL,
    api_key: ApiKey = None,
    as_json: Json = False,
) -> None:
    """Rank the features that separate positive from negative texts, measured on a running server."""
    texts = read_texts(positive, "--positive"), read_texts(negative, "--negative")
    with connected(url, api_key) as client, working(f"reading {len(texts[0]) + len(texts[1])} texts"):
        # The server knows which pools there are and says so.
        answer = client.contrast(sae, *texts, limit=limit, pool=pool, max_density=max_density)  # type: ignore[arg-type]
    if as_json:
        print_json(answer.model_dump())
        return
    table = Table(
        "feature",
        "label",
        answer.score_name.replace("_", " "),
        "AUROC",
        "95 %",
        "density",
        "mean +",
        "mean −",
        title=f"{sae}: {len(texts[0])} positive against {len(texts[1])} negative texts",
    )
    for feature in answer.data:
        interval = "" if feature.auroc_interval is None else "{:.2f} to {:.2f}".format(*feature.auroc_interval)
        means = _number(feature.mean_positive), _number(feature.mean_negative)
        numbers = (f"{feature.score:.3f}", _number(feature.auroc), interval, _percent(feature.density), *means)
        table.add_row(str(feature.index), _label(feature.label), *numbers)
    console.print(table)
    left_out = f"{answer.outlier_tokens} outlier tokens left out" if answer.outlier_tokens else ""
    cut = f"at {answer.truncated_tokens} tokens more features were active than are reported"
    notes = [note for note in (left_out, cut if answer.truncated_tokens else "") if note]
    if notes:
        console.print("; ".join(notes), style="dim", highlight=False)


# drawing --------------------------------------------------------------------------------------------------------------


def _card(sae: str, card: Mapping[str, Any], n_contexts: int) -> RenderableType:
    facts = Table.grid(padding=(0, 2))
    label = card.get("label")
    origin = f"  ({card['label_source']})" if label and card.get("label_source") else ""
    facts.add_row("label", _label(label).append(origin, "dim"))
    facts.add_row("fires on", f"{_percent(card.get('density'))} of tokens")
    fired = f"mean {_number(card.get('mean_activation'))}, largest {_number(card.get('max_activation'))}"
    quantiles = card.get("quantiles") or {}
    spread = ", ".join(f"{100 * float(share):g} % below {_number(value)}" for share, value in sorted(quantiles.items()))
    facts.add_row("activation", f"{fired}{f' ({spread})' if spread else ''}")
    for name in ("promoted", "suppressed"):
        tokens = [entry["token"] for entry in (card.get(name) or [])[:_SHOWN_TOKENS]]
        if tokens:
            facts.add_row(name, Text(" ".join(_visible(token).strip() or repr(token) for token in tokens)))
    near = [
        f"{entry['index']} {entry.get('label') or '—'} ({entry['cosine']:.2f})"
        for entry in (card.get("neighbours") or [])[:5]
    ]
    if near:
        facts.add_row("near", Text("\n".join(near)))
    parts: list[RenderableType] = [Panel(facts, title=f"{sae}  {card['index']}", title_align="left")]
    found = (card.get("contexts") or [])[:n_contexts]
    if found:
        largest = max(max(context["activations"], default=0.0) for context in found) or 1.0
        table = Table("activation", "context", "from", show_edge=False, pad_edge=False)
        for context in found:
            peak = context["activations"][context["peak"]]
            table.add_row(
                f"{peak:.1f}", highlighted(context, largest, plain=not console.is_terminal), context["source"]
            )
        parts.append(table)
    return Group(*parts)


def highlighted(context: Mapping[str, Any], largest: float, *, plain: bool) -> Text:
    """The context with each token's activation as the warmth of its background; ``plain`` marks the peak as «token»."""
    text = Text()
    pairs = zip(context["tokens"], context["activations"], strict=True)
    for i, (token, activation) in enumerate(pairs):
        shown = _visible(token)
        if plain:
            body = shown.lstrip(" ")
            text.append(shown if i != context["peak"] else f"{shown[: len(shown) - len(body)]}«{body}»")
            continue
        share = min(1.0, max(0.0, activation / largest))
        text.append(shown, _style(share) if share > 0 else None)
    return text


def _style(share: float) -> str:
    """Style of a token with ``share`` of the largest activation."""
    cold, warm = _WARMTH
    red, green, blue = (round(low + share * (high - low)) for low, high in zip(cold, warm, strict=True))
    return f"{'black' if share > 0.5 else 'white'} on rgb({red},{green},{blue})"


def _visible(token: str) -> str:
    """The token on one line, control characters replaced."""
    shown = token.replace("\n", "⏎").replace("\t", "⇥")
    return "".join(character if character.isprintable() else "·" for character in shown)


def _label(label: str | None) -> Text:
    return Text("—", "dim") if label is None else Text(_visible(label))


def _number(value: Any) -> str:
    return "—" if value is None else f"{float(value):.3g}"


def _percent(value: Any) -> str:
    return "—" if value is None else f"{100 * float(value):.2g} %"
