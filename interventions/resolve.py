"""Names of a request to the server's content, each checked, and refused with the field that it stands in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from interventions.catalogue import Catalogue, CatalogueSAE, how_to_edit, needs_full_encode
from interventions.errors import Code, InterventionError
from interventions.fields import Part
from interventions.items import join
from interventions.program import ReadKind
from interventions.selectors import ALL, GENERATED, LAST_PROMPT_TOKEN, PROMPT, Selector, slice_selector, union
from interventions.wording import choices, printable, show

_KEYWORD = {"all": ALL, "prompt": PROMPT, "generated": GENERATED, "last_prompt_token": LAST_PROMPT_TOKEN}


def check_limit(name: str, have: int, bound: int, param: str) -> None:
    """Refuse more of something than the server allows; raises ``limit_exceeded``."""
    if have > bound:
        shown = name.replace("_", " ")
        raise InterventionError("limit_exceeded", f"{param}: {have} {shown}; this server allows {bound}", param)


def placed(error: InterventionError, param: str) -> InterventionError:
    """The catalogue's error, with the field that named the missing thing."""
    if error.param is None:
        error.param = param
    return error


@dataclass
class Resolver:
    """What the server has, by name.

    Attributes:
        needs_full: ids of the SAEs all of whose latents the request needs, so far.
    """

    catalogue: Catalogue
    needs_full: set[str] = field(default_factory=set)

    def sae(self, name: str, param: str) -> CatalogueSAE:
        """The SAE of that id."""
        try:
            return self.catalogue.sae(name)
        except InterventionError as error:
            raise placed(error, param) from None

    def full(self, offered: CatalogueSAE, param: str, code: Code, why: str) -> None:
        """Note that all latents of the SAE are needed; refuse if the engine does not compute them."""
        sae = offered.sae
        if not offered.full_encode:
            how = how_to_edit(offered)
            if not needs_full_encode(sae):
                how = f"start the server with --full-encode {offered.id} ({sae.architecture} SAE)"
            raise InterventionError(code, f"{param}: {why}, {how}", param)
        self.needs_full.add(offered.id)

    def latents(self, offered: CatalogueSAE, param: str) -> ReadKind:
        """How the latents of the SAE are read in order to be edited; refuses an SAE that cannot be edited here."""
        self.check_layer(offered.layer, param)
        if not needs_full_encode(offered.sae):
            return ReadKind.LATENT
        self.full(offered, param, "invalid_intervention", "to edit its latents")
        return ReadKind.MEMBER if offered.sae.additive else ReadKind.JOINT

    def check_index(self, offered: CatalogueSAE, index: int, param: str) -> None:
        """Refuse a latent that the SAE does not have."""
        if not 0 <= index < offered.sae.n_features:
            message = f"index {show(index)}; {offered.id} has 0..{offered.sae.n_features - 1}"
            raise InterventionError("unknown_feature", f"{param}: {message}", param)

    def check_layer(self, layer: int, param: str) -> None:
        """Refuse a layer that the model does not have, or that is not armed."""
        n_layers, armed = self.catalogue.n_layers, sorted(self.catalogue.armed_layers)
        if not 0 <= layer < n_layers:
            message = f"layer {show(layer)}; the model has 0..{n_layers - 1}"
            raise InterventionError("invalid_intervention", f"{param}: {message}", param)
        if layer not in armed:
            message = f"layer {layer} is not armed; armed are {choices(armed)}"
            hint = f"start the server with --arm-layers {layer} to edit it"
            raise InterventionError("layer_not_armed", f"{param}: {message} ({hint})", param)

    def selector(self, parts: Sequence[Part], include_bos: bool, param: str, code: Code) -> Selector:
        """The canonical selector of a ``tokens`` field."""
        limits = self.catalogue.limits
        check_limit("selector_parts", len(parts), limits.selector_parts, param)
        check_limit("selector_tokens", sum(len(part.tokens) for part in parts), limits.selector_tokens, param)
        found: list[Selector] = []
        for part in parts:
            if part.keyword is not None:
                found.append(_KEYWORD[part.keyword])
            elif part.slice is not None:
                found.append(slice_selector(*part.slice))
            else:
                path = (*part.path, "tokens")
                ids = [self._token_id(t, join(param, *path, i), code) for i, t in enumerate(part.tokens)]
                found.append(Selector((), tuple(ids)))
        return union(found, include_bos)

    def _token_id(self, token: int | str, param: str, code: Code) -> int:
        if isinstance(token, int):
            if not 0 <= token < self.catalogue.vocab_size:
                message = f"token id {show(token)}; the model has 0..{self.catalogue.vocab_size - 1}"
                raise InterventionError(code, f"{param}: {message}", param)
            return token
        tried: list[str] = []
        for text in (token, f" {token}"):
            ids = self.catalogue.encode_text(text)
            if len(ids) == 1:
                return ids[0]
            pieces = choices(repr(printable(self.catalogue.decode_token(i))) for i in ids[:16])
            tried.append(f"{show(text)} is {len(ids)} tokens ({pieces}{', …' if len(ids) > 16 else ''})")
        raise InterventionError(code, f"{param}: a string must be exactly one token; {', '.join(tried)}", param)
