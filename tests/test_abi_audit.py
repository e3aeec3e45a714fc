"""tools/abi_audit.py: which symbols of torch count as stable."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import pytest
import torch

TOOL = Path(__file__).resolve().parent.parent / "tools" / "abi_audit.py"


@pytest.fixture(scope="module")
def audit() -> dict[str, Any]:
    if not TOOL.is_file():
        pytest.skip("not a checkout")
    return runpy.run_path(str(TOOL))


@pytest.fixture(scope="module")
def stable(audit: dict[str, Any]) -> set[str]:
    names: set[str] = audit["stable_names"](Path(torch.__file__).parent / "include")
    return names


@pytest.mark.parametrize(
    ("symbol", "is_stable"),
    [
        ("torch_call_dispatcher", True),
        ("torch_parallel_for", True),
        ("aoti_torch_get_data_ptr", True),
        ("aoti_torch_dtype_bfloat16", True),
        # One of Inductor's shims, but torch/csrc/stable/ops.h calls it.
        ("aoti_torch_aten_narrow", True),
        ("aoti_torch_cpu_convolution", False),
        ("aoti_torch_cuda_mm_out", False),
        ("aoti_torch_that_never_was", False),
        ("_ZN2at4_ops5empty4callEv", False),
        ("_ZNK3c1010TensorImpl5sizesEv", False),
        ("_ZTIN3c105ErrorE", False),
        # Not torch's: the C library's, the C++ library's (std::string::at), Python's.
        ("memcpy@GLIBC_2.14", True),
        ("_ZNKSs2atEm@GLIBCXX_3.4", True),
        ("_ZNSt6vectorIlSaIlEE2atEm", True),
    ],
)
def test_stable_symbols(audit: dict[str, Any], stable: set[str], symbol: str, is_stable: bool) -> None:
    assert audit["unstable"]({symbol, "torch_call_dispatcher"}, stable) == ([] if is_stable else [symbol])


def test_a_torch_without_the_headers_is_an_error(audit: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="no headers of the stable ABI"):
        audit["stable_names"](tmp_path)
