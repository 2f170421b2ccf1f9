"""The request object that runs a rule set; :mod:`interventions.rule_compile` has what it compiles into."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Field, PlainValidator, WithJsonSchema, model_validator

from interventions.fields import ALL_TOKENS, fault, text
from interventions.items import Common
from interventions.wording import show

MAX_TEXT = 2**18
"""Longest rule set in the text form, in characters."""

INLINE = ("propositions", "rules", "actions")


def _ruleset(value: Any) -> Any:
    if isinstance(value, str):
        return text(value, at_most=256)
    if not isinstance(value, dict):
        raise fault(
            f'expected the name of a library rule set, or {{"propositions", "rules", "actions"}}; got {show(value)}'
        )
    return value


def _text(value: Any) -> str:
    return text(value, at_most=MAX_TEXT)


_FORM = {
    "type": "object",
    "properties": {"propositions": {"type": "object"}, "rules": {"type": "array"}, "actions": {"type": "array"}},
    "additionalProperties": False,
}

RulesetField = Annotated[
    Any,
    PlainValidator(_ruleset),
    WithJsonSchema({"anyOf": [{"type": "string", "minLength": 1, "maxLength": 256}, _FORM]}),
]
Members = Annotated[Any, WithJsonSchema({"type": "object"})]
Items = Annotated[Any, WithJsonSchema({"type": "array"})]
Text = Annotated[str, PlainValidator(_text), WithJsonSchema({"type": "string", "minLength": 1, "maxLength": MAX_TEXT})]


class Rules(Common):
    """Runs rules over SAE features while the model does, and acts on what they conclude.

    A library rule set by name, or one that the request brings: as ``propositions``, ``rules`` and ``actions`` (the JSON
    form), or as ``text``. With ``when``, every rule also waits for that expression. What is inside is read by
    :mod:`interventions.rules`.
    """

    type: Literal["rules"] = Field("rules", description="Kind of intervention.")
    ruleset: RulesetField | None = Field(
        None, description="Name of a library rule set, or the rule set itself in the JSON form."
    )
    propositions: Members | None = Field(None, description="Name → score over features and its threshold.")
    rules: Items | None = Field(None, description="Bodies over propositions and conclusions, and what each concludes.")
    actions: Items | None = Field(None, description="What happens on a conclusion: do, refuse, flag or log.")
    text: Text | None = Field(None, description="The rule set in the text form.")

    @model_validator(mode="after")
    def _one_form(self) -> Self:
        inline = [name for name in INLINE if self.given(name)]
        forms = [name for name in ("ruleset", "text") if self.given(name)] + ([" with ".join(inline)] if inline else [])
        if len(forms) != 1:
            have = f"got {' and '.join(forms)}" if forms else "got none"
            raise fault(f"needs exactly one of ruleset, text, and rules with propositions and actions; {have}")
        return self

    @model_validator(mode="after")
    def _no_selector(self) -> Self:
        where = "put it into the intervention of an action"
        if self.tokens != ALL_TOKENS:
            raise fault(f"does not go with rules, which look at every token; {where}", "tokens")
        if self.include_bos:
            raise fault(f"does not go with rules, for which position 0 is never evidence; {where}", "include_bos")
        return self

    @property
    def raw(self) -> Any:
        """The rule set as text or in the JSON form; the name of a library one."""
        if self.text is not None:
            return self.text
        if self.ruleset is not None:
            return self.ruleset
        return {name: getattr(self, name) for name in INLINE if self.given(name)}

    @property
    def source(self) -> str:
        """Path of the field that holds it in the request."""
        field = next((name for name in ("text", "ruleset") if self.given(name)), "")
        return f"{self.param}.{field}" if field else self.param
