"""The grammar of the text form."""

from __future__ import annotations

import re

NAME = r"[^\W\d]\w*(?:[.-](?=\w)\w+)*"
"""What a name looks like: words of letters, digits and _, joined by - or . without spaces."""

GRAMMAR = r"""
ruleset: statement*
?statement: declaration | clause | deed

declaration: "proposition" name "=" comparison
clause: "rule" [name] ":" [variables] _disjunction "->" [LATCH] name
variables: "for" variable ("," variable)* ":"
variable: name "in" "{" name ("," name)* "}"
deed: "on" name ":" (doing | refusing | FLAG | LOG)
refusing: "refuse" STRING
doing: "do" object ["strength" signed] [duration]
?duration: TOKEN -> one | "from" "now" "on" -> forever | "for" NUMBER "tokens" -> several

when: _expression
_expression: _disjunction | implication
implication: _disjunction "->" _expression
_disjunction: _exclusive | disjunction
disjunction: _exclusive ("or" _exclusive)+
_exclusive: _conjunction | exclusive
exclusive: _conjunction ("xor" _conjunction)+
_conjunction: _negation | conjunction
conjunction: _negation ("and" _negation)+
_negation: _ordered | negation
negation: NOT _negation
_ordered: _primary | sequence
sequence: _primary ("before" _primary)+
_primary: "(" _expression ")" | mention | inline | ended | _scope | counted
mention: NAME
inline: comparison
ended: ENDED
_scope: within | window
within: (TOKEN | SEEN | PROMPT) ["tokens"] "(" _expression ")"
window: "last" "(" NUMBER "," _expression ")"
counted: ("at" "least" | GE) quantity "of" _scope
quantity: NUMBER [PERCENT]

comparison: _score (GE | GT | LE | LT) signed
_score: sum | tree
sum: [SIGN] term (SIGN term)*
term: [NUMBER "*"] "feature" "(" sae "," NUMBER ")"
tree: "tree" "(" sae "," branch ")"
?branch: signed -> leaf | "(" branch ")" | split
split: "if" NUMBER (GE | GT) signed "then" branch "else" branch
sae: SAE | STRING
signed: [SIGN] NUMBER
name: NAME

?value: object | array | STRING -> string | signed | "true" -> true | "false" -> false | "null" -> null
object: "{" [pair ("," pair)*] "}"
pair: STRING ":" value
array: "[" (value ("," value)*)? "]"

LATCH: "latch"
FLAG: "flag"
LOG: "log"
NOT: "not"
TOKEN: "token"
SEEN: "seen"
PROMPT: "prompt"
ENDED: "prompt_ended"
GE: ">=" | "≥"
GT: ">"
LE: "<=" | "≤"
LT: "<"
SIGN: "+" | "-"
PERCENT: "%"
NAME: /@NAME@/
SAE: /[A-Za-z0-9][\w.:@+\-\/]*/
NUMBER: /(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?/
STRING: /"(?:[^"\\\x00-\x1f]|\\.)*"/
COMMENT: /#[^\n]*/
%ignore COMMENT
%ignore /[ \t\r\n]+/
""".replace("@NAME@", NAME)
"""The grammar (lark's notation). ``not`` binds tighter than ``and``, then ``xor``, ``or``, ``->``; ``before`` tightest."""

KEYWORDS = frozenset(re.findall(r'"([a-z_]+)"', GRAMMAR))
"""Words of the language: no names."""
