"""From the command line to a running server: what is opened, armed and passed on to vLLM."""

from __future__ import annotations

import os
from argparse import Namespace
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from editserver.catalogue import (
    CatalogueError,
    OpenedSAE,
    approximated,
    check_distinct,
    check_fit,
    full_encode_ids,
    open_sae,
)
from editserver.demo.model import MODEL_NAME, DemoModelError, ensure_demo_model
from editserver.engine.config import EngineConfig
from editserver.engine.wire import KEY
from editserver.settings import ATTRIBUTE, DoseBound, Settings, SettingsError
from interventions.limits import Limits
from interventions.wording import choices, nearest
from sae_weights.catalogue import bundled
from sae_weights.precision import quick_dtype

DEMO = "demo"
DEMO_LAYERS = (10, 15, 20)
DEMO_FLAGS = {
    "--served-model-name": MODEL_NAME,
    "--max-model-len": "4096",
    "--gpu-memory-utilization": "0.3",
}
"""vLLM flags of the demo, each unless the user gives it, and ``--dtype``: the type that the machine multiplies quickly."""

DEMO_KV_GIB = "1"
"""KV cache of the demo on a CPU: about 45,000 tokens, half of that in float32."""

PLUGIN_GROUPS = ("vllm.general_plugins", "vllm.endpoint_plugins")


class UsageError(ValueError):
    """The server cannot be started like this; the message says why and what would work."""


@dataclass(frozen=True)
class Options:
    """Our own options of ``serve``, as typed."""

    saes: tuple[str, ...] = ()
    arm_layers: str | None = None
    full_encode: tuple[str, ...] = ()
    approximate: tuple[str, ...] = ()
    library: Path | None = None
    max_dose: str | None = None
    bank_rows: int | None = None
    limits: tuple[str, ...] = ()
    max_body_mib: float | None = None


def prepare(model: str, options: Options, vllm_flags: Sequence[str]) -> Namespace:
    """vLLM's parsed arguments with our configuration in them, and the environment that its processes need.

    Raises:
        UsageError: something named does not exist, does not fit, or cannot be combined with editing.
    """
    from editserver.api.vllm_entry import parse_serve_args

    check_plugins()
    sources, flags, path = list(options.saes), list(vllm_flags), model
    layers: set[int] = set()
    if model == DEMO:
        try:
            path = str(ensure_demo_model())
        except DemoModelError as error:
            raise UsageError(str(error)) from error
        named = {source.partition("=")[0] for source in sources}
        sources += [one for one in bundled() if one.startswith("smollm2-135m/") and one not in named]
        flags += demo_flags(flags)
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", DEMO_KV_GIB)
        if options.arm_layers is None:
            layers = set(DEMO_LAYERS)
    args = parse_serve_args([path, *flags])
    refuse_flags(args)
    args.api_server_count = 1  # left to itself, vLLM starts one for each data-parallel engine
    opened = open_saes(sources, options.approximate)
    if opened and (shape := model_shape(args)) is not None:
        _check_fit(opened, *shape)
    if options.arm_layers is not None:
        layers = parse_layers(options.arm_layers, lambda: count_layers(args))
    layers |= {one.layer for one in opened}
    if not layers:
        raise UsageError(
            "there is nothing to edit: name a dictionary with --sae [NAME=]FOLDER, or layers to steer with --arm-layers 10,15"
        )
    settings = build_settings(options)
    config = EngineConfig(
        armed=tuple(sorted(layers)),
        saes=tuple(one.source() for one in opened),
        full_encode=_full_encode(opened, options.full_encode),
        bank_rows=settings.limits.bank_rows,
        propositions=settings.limits.propositions,
    )
    args.additional_config = merged(args.additional_config, config)
    args.enable_prompt_tokens_details = True
    setattr(args, ATTRIBUTE, settings)
    os.environ["VLLM_PLUGINS"] = ",".join(plugin_names(os.environ.get("VLLM_PLUGINS")))
    start_sooner()
    return args


def start_sooner() -> None:
    """On a CPU, have Inductor's cache serve the second start: what vLLM (up to 0.32 at least) saves when it compiles ahead of
    time it cannot load there, and compiles anew (vllm/compilation/decorators.py:315, a plain function has no
    ``finalize_loading``). What the user has set stays."""
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        os.environ.setdefault("VLLM_USE_AOT_COMPILE", "0")


def demo_flags(given: Sequence[str]) -> list[str]:
    """The demo's vLLM flags that the user did not give."""
    names = {flag.split("=")[0].replace("_", "-") for flag in given if flag.startswith("--")}
    own = {**DEMO_FLAGS, "--dtype": served_dtype()}
    return [part for name, value in own.items() if name not in names for part in (name, value)]


def served_dtype() -> str:
    """bfloat16, or float32 on a CPU that multiplies no bfloat16, as vLLM is told."""
    from vllm.platforms import current_platform

    return "bfloat16" if not current_platform.is_cpu() else str(quick_dtype()).removeprefix("torch.")


def slow_numbers(args: Namespace) -> str | None:
    """What to say to whoever has a CPU compute in a type that it does not multiply; None where it does."""
    if args.dtype in ("float32", "float") or served_dtype() == "bfloat16":
        return None
    return (
        "this CPU multiplies no bfloat16, and takes several times as long for it as for float32; "
        "--dtype float32 is quicker, at twice the memory"
    )


def open_saes(sources: Iterable[str], approximate: Sequence[str] = ()) -> list[OpenedSAE]:
    """Every ``--sae``, those of ``--approximate`` as their stand-ins; two of one name are an error."""
    opened: list[OpenedSAE] = []
    for source in sources:
        try:
            one = open_sae(source)
        except CatalogueError as error:
            raise UsageError(str(error)) from error
        if any(other.id == one.id for other in opened):
            raise UsageError(f"--sae {source}: the name {one.id!r} is taken; give another with --sae NAME=SOURCE")
        opened.append(one)
    try:
        check_distinct(opened)
        return approximated(opened, approximate)
    except CatalogueError as error:
        raise UsageError(str(error)) from error


def _check_fit(opened: Sequence[OpenedSAE], d_model: int, n_layers: int) -> None:
    try:
        check_fit(opened, d_model, n_layers)
    except CatalogueError as error:
        raise UsageError(str(error)) from error


def _full_encode(opened: Sequence[OpenedSAE], chosen: Sequence[str]) -> tuple[str, ...]:
    try:
        return full_encode_ids(opened, chosen)
    except CatalogueError as error:
        raise UsageError(str(error)) from error


def parse_layers(text: str, n_layers: Any) -> set[int]:
    """``10,15`` or ``all``; ``n_layers`` is called for ``all`` only."""
    if text.strip() == "all":
        return set(range(n_layers()))
    layers: set[int] = set()
    for part in text.split(","):
        if not part.strip().isdigit():
            raise UsageError(f"--arm-layers {text}: {part!r} is not a layer number; write 10,15 or all")
        layers.add(int(part))
    return layers


def count_layers(args: Namespace) -> int:
    """Decoder layers of the model, from its config."""
    return int(_text_config(args).num_hidden_layers)


def model_shape(args: Namespace) -> tuple[int, int] | None:
    """Width and number of layers of the model; None where its config cannot be read, which vLLM will say better."""
    try:
        config = _text_config(args)
        return int(config.hidden_size), int(config.num_hidden_layers)
    except Exception:
        return None


def _text_config(args: Namespace) -> Any:
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(args.model, revision=args.revision, trust_remote_code=args.trust_remote_code)
    return config.get_text_config()


def build_settings(options: Options) -> Settings:
    """The API's settings."""
    try:
        dose = DoseBound.parse(options.max_dose) if options.max_dose is not None else DoseBound()
    except SettingsError as error:
        raise UsageError(str(error)) from error
    settings = Settings(limits=parse_limits(options.limits, options.bank_rows), dose=dose)
    if options.library is not None:
        if "://" in str(options.library) or ":/" in str(options.library):
            raise UsageError(f"--library {options.library}: this version keeps the library in a folder, not at a URL")
        settings = replace(settings, library=options.library.expanduser().resolve())
    if options.max_body_mib is not None:
        if not options.max_body_mib > 0:
            raise UsageError(f"--max-body-mib {options.max_body_mib:g}: must be above 0")
        settings = replace(settings, max_body_bytes=int(options.max_body_mib * 2**20))
    return settings


def parse_limits(given: Sequence[str], bank_rows: int | None) -> Limits:
    """``NAME=N`` for the limits of one request, and the size of the bank."""
    known = [field.name for field in fields(Limits) if field.name != "bank_rows"]
    values: dict[str, int] = {} if bank_rows is None else {"bank_rows": bank_rows}
    for item in given:
        name, _, number = item.partition("=")
        name = name.replace("-", "_")
        if name not in known:
            raise UsageError(f"--limit {item}: limits are {choices(known)}.{nearest(name, known)}")
        if not number.isdigit():
            raise UsageError(f"--limit {item}: write {name}=N with a whole number N")
        values[name] = int(number)
    try:
        return Limits(**values)
    except ValueError as error:
        raise UsageError(f"--limit, --bank-rows: {error}") from error


def refuse_flags(args: Namespace) -> None:
    """What only the command line shows and what edits cannot be combined with; the engine checks the rest at start."""
    found = {
        "--api-server-count above 1 (bank and receipts belong to one API process)": (args.api_server_count or 1) > 1,
        "--headless (no API process)": bool(args.headless),
        "--grpc (only HTTP carries edits)": bool(getattr(args, "grpc", False)),
        "--skip-tokenizer-init (token selectors need the tokenizer)": bool(args.skip_tokenizer_init),
    }
    named = [flag for flag, present in found.items() if present]
    if named:
        raise UsageError(f"editing cannot be combined with {'; '.join(named)}")


def merged(additional: Any, config: EngineConfig) -> dict[str, Any]:
    """The user's ``--additional-config`` and ours."""
    if additional is None:
        additional = {}
    if not isinstance(additional, dict):
        raise UsageError("--additional-config must be a JSON object")
    if KEY in additional:
        raise UsageError(f"--additional-config: the key {KEY!r} is set by editserver's own options; leave it out")
    return {**additional, KEY: config.as_dict()}


def plugin_names(already: str | None) -> list[str]:
    """Value for ``VLLM_PLUGINS``, which filters every group of plugins and must name endpoint plugins to enable them.

    Unset, it would have meant all plugins but those of endpoints: they stay enabled. Set, ours is added.
    """
    if already is not None:
        names = [name for name in already.split(",") if name]
        return names if KEY in names else [*names, KEY]
    installed = entry_points()
    groups = [group for group in installed.groups if group.startswith("vllm.") and group != PLUGIN_GROUPS[1]]
    return list(dict.fromkeys([KEY, *(point.name for group in groups for point in installed.select(group=group))]))


def check_plugins() -> None:
    """vLLM finds us through installed entry points, and swallows an exception while it imports them: look first."""
    for group in PLUGIN_GROUPS:
        found = list(entry_points(group=group, name=KEY))
        if not found:
            raise UsageError(
                f"vLLM does not see editserver's {group} entry point; run: pip install -e . (or make setup)"
            )
        found[0].load()
