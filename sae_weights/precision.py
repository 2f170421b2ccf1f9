"""Which numbers a device multiplies quickly."""

from __future__ import annotations

import torch


def quick_dtype(device: str | torch.device = "cpu") -> torch.dtype:
    """bfloat16, or float32 on a CPU that multiplies no bfloat16.

    An x86 CPU without AVX-512 takes several times as long for a matrix product in bfloat16 as for one in float32, which is
    the more exact one as well.
    """
    if torch.device(device).type != "cpu":
        return torch.bfloat16
    multiplies = torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return torch.bfloat16 if multiplies else torch.float32
