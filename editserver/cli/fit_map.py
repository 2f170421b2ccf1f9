"""``editserver fit map …``: maps over latents that make a topic or an entity forgotten."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from editserver.cli.remote import DEFAULT_URL, ApiKey, Json, Url, connected, fail, read_texts

app = typer.Typer(
    help="Fit a map over latents that makes a topic or an entity forgotten.",
    no_args_is_help=True,
    rich_markup_mode="rich",
)
_errors = Console(stderr=True)

FORGET_EXAMPLES = """[bold]Examples[/bold] (start a server first: editserver serve demo)

editserver fit map forget no-cooking --sae smollm2-135m/l15 --forget examples/maps/cooking.jsonl
--retain examples/maps/retain.jsonl --report ./no-cooking

editserver fit map forget no-paris --sae smollm2-135m/l10 --forget paris.txt --retain retain.jsonl --mention Paris
--gate none --clamp 0.5 --questions paris-questions.jsonl

[bold]Formats[/bold] A file has one text a line; lines of .jsonl are strings, {"text": …} or {"messages": […]}.

[bold]Then[/bold] {"interventions": [{"type": "remap", "map": "no-cooking", "strength": 1}]} in any request.
"""
UNKNOWN_EXAMPLES = """[bold]Examples[/bold] (start a server first: editserver serve demo)

editserver fit map unknown no-einstein --sae smollm2-135m/l10 --known examples/maps/known.txt
--unknown examples/maps/invented.txt --target "Albert Einstein" --target Einstein --text examples/maps/retain.jsonl
--questions examples/maps/questions.jsonl --report ./no-einstein

[bold]Formats[/bold] Entities: one name a line, or .jsonl with {"name": …, "type": …}; latents then must tell known from
unknown in every type. Questions: .jsonl with {"question": …, "answer": text or list, "entity": …}.

[bold]Unknown names[/bold] must be invented ones of as many tokens as the known ones; what has no partner is left out.
"""


class SelectName(StrEnum):
    """How latents are found."""

    difference = "difference"
    ratio = "ratio"
    frequency = "frequency"


class GateName(StrEnum):
    """What decides whether a sequence is about the topic."""

    share = "share"
    window = "window"
    cusum = "cusum"
    none = "none"


class OverName(StrEnum):
    """What a share is of."""

    seen = "seen"
    prompt = "prompt"


class TokensName(StrEnum):
    """Which latents are clamped on a token."""

    hit = "hit"
    active = "active"


class UnitName(StrEnum):
    """What the clamp is counted in."""

    residual_norm = "residual_norm"
    preact_mean = "preact_mean"
    absolute = "absolute"


class MentionName(StrEnum):
    """Which tokens of a mention."""

    last = "last"
    all = "all"


Name = Annotated[str, typer.Argument(metavar="NAME", help="The map's name in the library.")]
SaeId = Annotated[str | None, typer.Option(metavar="ID", help="The served dictionary; needed if there are several.")]
Questions = Annotated[
    Path | None, typer.Option(metavar="FILE", help="Questions with answers: recall without and with the map.")
]
Strengths = Annotated[str, typer.Option(metavar="0.5,1,…", help="Strengths at which the map is measured.")]
Measure = Annotated[bool, typer.Option("--measure/--no-measure", help="Measure the stored map on the server.")]
Output = Annotated[
    Path | None, typer.Option(metavar="FILE", help="Write the map there instead of storing it on the server.")
]
Report = Annotated[Path | None, typer.Option(metavar="DIR", help="Write report.json and report.png there.")]
MentionTokens = Annotated[
    MentionName, typer.Option(help="Last token of a mention, anywhere; or all its tokens, in prompts.")
]
Longest = Annotated[int, typer.Option(min=2, help="Tokens of a text that are read.")]
AnswerTokens = Annotated[int, typer.Option(min=1, help="Longest answer to a question.")]
Seed = Annotated[int, typer.Option(min=0, help="Of the split into parts that fit and that judge.")]


@app.command(epilog=FORGET_EXAMPLES)
def forget(
    name: Name,
    forget: Annotated[
        list[str], typer.Option("--forget", metavar="FILE|TEXT", help="Texts of what is to be forgotten. Repeatable.")
    ],
    retain: Annotated[
        list[str],
        typer.Option(metavar="FILE|TEXT", help="Texts to leave alone, of all formats of your traffic. Repeatable."),
    ],
    sae: SaeId = None,
    select: Annotated[
        SelectName,
        typer.Option(
            help="By difference of firing counts (CRISP), ratio of importances (DSG), or firing frequency (Farrell et al.)."
        ),
    ] = SelectName.difference,
    latents: Annotated[int, typer.Option(min=1, max=1024, help="At most so many latents.")] = 10,
    gate: Annotated[
        GateName,
        typer.Option(
            help="Act on sequences with a run of hits (cusum), a share of them, a share in a window, or on all."
        ),
    ] = GateName.cusum,
    over: Annotated[
        OverName, typer.Option(help="Share of the tokens seen so far, at every token; or of the prompt, at its end.")
    ] = OverName.seen,
    window: Annotated[int, typer.Option(min=1, max=65536, help="Tokens of a window gate.")] = 32,
    least: Annotated[int, typer.Option(min=1, help="Tokens before which a share or window says nothing.")] = 8,
    drift: Annotated[
        float | None, typer.Option(min=0.0, max=0.95, help="CUSUM's k; default: between the hit rates of both sets.")
    ] = None,
    latch: Annotated[bool, typer.Option("--latch/--no-latch", help="Stay open once opened.")] = True,
    false_positive_rate: Annotated[
        float, typer.Option(min=0.001, max=0.5, help="Share of retain sequences on which the gate may open.")
    ] = 0.05,
    clamp: Annotated[float, typer.Option(min=0.0, help="c: latents are set to −c units.")] = 1.0,
    unit: Annotated[
        UnitName,
        typer.Option(help="The token's ‖h‖, CRISP's mean pre-activation (with --tokens active), or latent units."),
    ] = UnitName.residual_norm,
    tokens: Annotated[
        TokensName, typer.Option(help="Clamp all latents where any is active (hit), or each where it is (active).")
    ] = TokensName.hit,
    mention: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="Act on mentions of this name only. Repeatable.")
    ] = None,
    mention_tokens: MentionTokens = MentionName.last,
    questions: Questions = None,
    strengths: Strengths = "0.5,1,2",
    measure: Measure = True,
    longest: Longest = 512,
    answer_tokens: AnswerTokens = 32,
    output: Output = None,
    report: Report = None,
    seed: Seed = 0,
    url: Url = DEFAULT_URL,
    api_key: ApiKey = None,
    as_json: Json = False,
) -> None:
    """Forget a topic or an entity: clamp the latents of its texts, on sequences that a calibrated gate lets through.

    A third of the retain texts calibrates the gate, a third of all texts judges the result: give a few dozen of each (57 to
    retain for a false-positive rate of 5 %), chats among them.
    """
    from editserver.cli.fit_map_forget import run
    from editserver.cli.fit_map_job import Options
    from editserver.cli.fit_map_measure import parse_strengths, read_questions
    from editserver.cli.fit_map_report import show, write_report
    from editserver.cli.fit_map_server import stages
    from interventions.maps.fit_topic import TopicSettings
    from interventions.maps.transfer import Unit

    if questions is not None and not mention:
        fail("--questions: recall is of questions about an entity; name it with --mention, or use: fit map unknown")
    settings = TopicSettings(
        select=select.value,
        latents=latents,
        gate=gate.value,
        over=over.value,
        window=window,
        least=least,
        drift=drift,
        latch=latch,
        false_positive_rate=false_positive_rate,
        clamp=clamp,
        unit=Unit(unit.value),
        tokens=tokens.value,
        seed=seed,
    )
    texts = read_texts(forget, "--forget"), read_texts(retain, "--retain")
    files = {"forget": _file(forget), "retain": _file(retain), "questions": questions}
    with connected(url, api_key) as client, stages(_errors) as stage:
        options = Options(
            name=name,
            output=output,
            strengths=tuple(parse_strengths(strengths)) if measure else (),
            questions=tuple(read_questions(questions)) if questions is not None and measure else (),
            longest=longest,
            answer_tokens=answer_tokens,
            report=report,
        )
        outcome = run(
            client, stage, options, settings, sae, *texts, mention or [], mention_tokens.value, files, url.rstrip("/")
        )
    write_report(outcome)
    show(outcome, Console(), as_json=as_json)


@app.command(epilog=UNKNOWN_EXAMPLES)
def unknown(
    name: Name,
    known: Annotated[Path, typer.Option(metavar="FILE", help="Entities that the model knows.")],
    unknown: Annotated[Path, typer.Option("--unknown", metavar="FILE", help="Invented ones, of equal token counts.")],
    target: Annotated[
        list[str], typer.Option(metavar="NAME", help="The entity to forget; repeat the option for its other names.")
    ],
    sae: SaeId = None,
    template: Annotated[
        list[str] | None,
        typer.Option(
            metavar="TEXT|FILE", help="Contexts with {} for the name; default: five, chats among them. Repeatable."
        ),
    ] = None,
    text: Annotated[
        list[str] | None,
        typer.Option(metavar="FILE|TEXT", help="Other texts: their perplexity, and latents that fire everywhere."),
    ] = None,
    known_latents: Annotated[int, typer.Option(min=0, max=1024, help="At most so many known latents.")] = 10,
    unknown_latents: Annotated[int, typer.Option(min=0, max=1024, help="At most so many unknown latents.")] = 10,
    match: Annotated[
        bool, typer.Option("--match/--no-match", help="Pair known and unknown entities by token count.")
    ] = True,
    mention_tokens: MentionTokens = MentionName.last,
    questions: Questions = None,
    strengths: Strengths = "0.5,1,2",
    measure: Measure = True,
    longest: Longest = 512,
    answer_tokens: AnswerTokens = 32,
    output: Output = None,
    report: Report = None,
    seed: Seed = 0,
    url: Url = DEFAULT_URL,
    api_key: ApiKey = None,
    as_json: Json = False,
) -> None:
    """Make a known entity look unknown: its mentions get the latents that unknown entities have.

    Latents that fire on known entities only, or on unknown ones only, are set to their mean over unknown ones; half of the
    entities judges whether a probe still tells the target from them.
    """
    from editserver.cli.fit_map_job import Options
    from editserver.cli.fit_map_measure import parse_strengths, read_entities, read_questions
    from editserver.cli.fit_map_report import show, write_report
    from editserver.cli.fit_map_server import stages
    from editserver.cli.fit_map_unknown import TEMPLATES, check_templates, run
    from interventions.maps.fit_entity import EntitySettings

    settings = EntitySettings(known=known_latents, unknown=unknown_latents, match=match, seed=seed)
    templates = read_texts(template, "--template") if template else list(TEMPLATES)
    texts = read_texts(text, "--text") if text else []
    files = {"known": known, "unknown": unknown, "text": _file(text or []), "questions": questions}
    with connected(url, api_key) as client, stages(_errors) as stage:
        check_templates(templates)
        options = Options(
            name=name,
            output=output,
            strengths=tuple(parse_strengths(strengths)) if measure else (),
            questions=tuple(read_questions(questions)) if questions is not None and measure else (),
            longest=longest,
            answer_tokens=answer_tokens,
            report=report,
        )
        entities = read_entities(known, "--known"), read_entities(unknown, "--unknown")
        outcome = run(
            client,
            stage,
            options,
            settings,
            sae,
            *entities,
            target,
            templates,
            texts,
            mention_tokens.value,
            files,
            url.rstrip("/"),
        )
    write_report(outcome)
    show(outcome, Console(), as_json=as_json)


def _file(given: list[str]) -> Path | None:
    """The file of an option that was given one file and nothing else."""
    path = Path(given[0]) if len(given) == 1 and len(given[0]) < 1000 else None
    return path if path is not None and path.is_file() else None
