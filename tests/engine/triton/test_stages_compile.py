"""The kernels of rules and of whole dictionaries compile for a GPU, on a machine without one, and spill nothing."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.engine.triton.compiling import check_registers, compiled, needs_assembler

SCRIPT = """
from editserver.engine.triton import encode, kernel_encode, kernel_propositions, kernel_rules, rules
from editserver.engine.triton.capacity import RuleCapacity

KINDS = {
    "*bf16": {"hidden", "residual"},
    "*fp32": {"acts", "scores", "weights", "thresholds", "branch_values", "gate", "pre", "scale", "members", "top_value", "views"},
    "*i64": {"own", "kept", "cells", "before", "opened", "token_slot", "token_selected", "wants"},
    "i32": {"acts_width", "scores_width", "cells_width", "blocks_of_a_row", "begin", "members_width", "top_width"},
}

words = dict(zip(("WP", "WC", "WA", "WM"), RuleCapacity(requests=1).words))
held = {"WP": words["WP"], "WORDS": sum(words.values())}
for tokens in (1, 4):
    size = {"T": tokens, "LOG": rules.LOG_PROPOSITIONS, **held}
    compiled(kernel_propositions.propositions_kernel, size, 4, KINDS)
for stage in (rules.DECODE_STAGE, rules.PROMPT_STAGE):
    size = {"BLOCK_SIZE": 16, "B": stage["B"], "WORDS": held["WORDS"], **words}
    compiled(kernel_rules.stage_kernel, size, stage["num_warps"], KINDS)
size = {"N": 65536, "FORM": 1}
compiled(kernel_encode.tokens_kernel, {"BLOCK": encode.TOKENS}, 4, KINDS)
view = {"NORM": 2, "CENTRED": True, "D": 4096, "WIDE": 12, "LOG": 10, "SPLIT": True}
compiled(kernel_encode.views_kernel, view, 4, KINDS)
product = {name: encode.PRODUCT[name] for name in ("BM", "BN", "BK")}
compiled(kernel_encode.encode_kernel, size | product | {"D": 4096, "ROWS": 256}, encode.PRODUCT["num_warps"], KINDS)
compiled(kernel_encode.take_kernel, size | {"K": 64, "ABS": True, "SCALED": True, "BLOCK": encode.VALUES}, 8, KINDS)
"""


@pytest.mark.slow
@needs_assembler
def test_the_optional_stages_compile_for_sm_90_and_none_spills(tmp_path: Path) -> None:
    paths = compiled(SCRIPT, tmp_path)
    assert len(paths) == 8
    for path in paths:
        check_registers(path)
