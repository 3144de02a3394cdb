"""The processor that kernels are compiled for, and the one place that decides how wide a vector is."""

import os
from functools import cache

import llvmlite.binding as llvm


@cache
def cpu_name() -> str:
    """LLVM's name of the processor; NUMBA_CPU_NAME overrides it, as it does for Numba itself."""
    return os.environ.get("NUMBA_CPU_NAME") or llvm.get_host_cpu_name()


@cache
def cpu_features() -> str:
    """LLVM's feature list ("+avx2,-sse4a,..."). With a chosen processor it is NUMBA_CPU_FEATURES or nothing."""
    if os.environ.get("NUMBA_CPU_FEATURES") is not None:
        return os.environ["NUMBA_CPU_FEATURES"]
    return "" if os.environ.get("NUMBA_CPU_NAME") else llvm.get_host_cpu_features().flatten()


@cache
def has_avx512() -> bool:
    """Whether 16-wide vectors, masks and the exponent instructions of AVX-512 are there."""
    features = cpu_features().split(",")
    return "+avx512f" in features and "+avx512dq" in features and "+avx512bw" in features


@cache
def has_bf16_rounding() -> bool:
    """Whether one instruction rounds 16 values to bfloat16, and llvmlite's LLVM spells it as we do (20 and later)."""
    return has_avx512() and "+avx512bf16" in cpu_features().split(",") and llvm.llvm_version_info[0] >= 20


@cache
def vector_width() -> int:
    """Float32 values in a vector register: 16 with AVX-512, 8 with AVX2, 4 on NEON and the rest."""
    if has_avx512():
        return 16
    return 8 if "+avx2" in cpu_features().split(",") else 4
