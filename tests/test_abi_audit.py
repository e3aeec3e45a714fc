"""tools/abi_audit.py: which symbols of torch count as stable."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import pytest
import torch

TOOL = Path(__file__).resolve().parent.parent / "tools" / "abi_audit.py"


@pytest.fixture
def audit() -> dict[str, Any]:
    if not TOOL.is_file():
        pytest.skip("not a checkout")
    return runpy.run_path(str(TOOL))


STABLE = [
    "torch_call_dispatcher",
    "torch_parallel_for",
    "aoti_torch_get_data_ptr",
    "aoti_torch_dtype_bfloat16",
    "aoti_torch_aten_narrow",  # one of Inductor's shims, but torch/csrc/stable/ops.h calls it
    # Not torch's: the C library's, the C++ library's (std::string::at).
    "memcpy@GLIBC_2.14",
    "_ZNKSs2atEm@GLIBCXX_3.4",
    "_ZNSt6vectorIlSaIlEE2atEm",
]
UNSTABLE = [
    "aoti_torch_cpu_convolution",
    "aoti_torch_cuda_mm_out",
    "aoti_torch_that_never_was",
    "_ZN2at4_ops5empty4callEv",
    "_ZNK3c1010TensorImpl5sizesEv",
    "_ZTIN3c105ErrorE",
]


def test_stable_symbols(audit: dict[str, Any]) -> None:
    stable = audit["stable_names"](Path(torch.__file__).parent / "include")
    assert set(audit["unstable"]({*STABLE, *UNSTABLE}, stable)) == set(UNSTABLE)


def test_a_torch_without_the_headers_is_an_error(audit: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="no headers of the stable ABI"):
        audit["stable_names"](tmp_path)
