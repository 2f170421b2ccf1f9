"""The kernels compile for a GPU, on a machine without one, and keep what they hold in registers."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.engine.triton.compiling import check_registers, compiled, needs_assembler

SCRIPT = """
from editserver.engine.triton import kernel_edit, kernel_gates, kernel_plan, kernel_read, step

KINDS = {
    "*bf16": {"hidden", "residual"},
    "*fp32": {"op_values", "dose_bound", "bank_read", "bank_write", "bank_gate", "members", "values", "coefficients", "dose",
              "out"},
    "*fp64": {"gate_limits", "largest"},
    "*i64": {"memory", "gate_ints", "opened", "token_slot", "token_selected", "token_open", "op_masks", "fired", "read_bits",
             "row_slot", "positions"},
    "i32": {"members_width", "values_width", "coefficients_width", "out_width", "blocks_of_a_row", "widest", "n_rows", "n_padded",
            "number"},
}
HITS = KINDS | {"*fp32": KINDS["*fp32"] - {"out"}, "*i64": KINDS["*i64"] | {"out"}}

compiled(kernel_plan.plan_kernel, {"TILE": step.TILE, "ROWS": 256, "BLOCK": step.PLAN_BLOCK, "HISTORY": 8192}, 4, KINDS)
compiled(kernel_gates.gates_kernel, {"BLOCK_SIZE": 16, "BLOCK": step.GATE_BLOCK, "FACTS": 4}, step.GATES["num_warps"], KINDS)
for variant in (step.DECODE, step.PROMPT):
    warps = variant["num_warps"]
    size = {name: variant[name] for name in ("T", "LOG_ROWS", "STAGES")} | {"D": 4096, "LOG": step.MOST_LANES, "SPLIT": True}
    channels = step.DECODE_CHANNELS if variant["T"] == 1 else step.PROMPT_CHANNELS
    size["WIDE"] = 12 if variant["T"] == 1 else step.MOST_LANES
    compiled(kernel_edit.edit_kernel, size | {"AHEAD": False, "LOG_CHANNELS": channels}, warps, KINDS)
    compiled(kernel_read.read_kernel, size | {"HITS": False, "REMEMBER": False}, warps, KINDS)
    compiled(kernel_read.read_kernel, size | {"HITS": True, "REMEMBER": True}, warps, HITS)
size = {name: step.DECODE[name] for name in ("LOG_ROWS", "STAGES")} | {"D": 4096, "LOG": step.MOST_LANES, "WIDE": 12, "SPLIT": True}
compiled(kernel_edit.ahead_kernel, size, step.DECODE["num_warps"], KINDS)
"""


@pytest.mark.slow
@needs_assembler
def test_every_kernel_compiles_for_sm_90_and_none_inside_the_model_spills(tmp_path: Path) -> None:
    paths = compiled(SCRIPT, tmp_path)
    assert len(paths) == 9
    for path in paths[1:]:  # the plan is made once, before the model runs
        check_registers(path)
