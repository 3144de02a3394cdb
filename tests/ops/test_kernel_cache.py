"""Compiled kernels on the disk, and what is said while one is made."""

from pathlib import Path

import pytest

from statespan.ops import kernel_cache, notices
from statespan.ops.cuda_kernels import compiler


def test_the_forms_of_a_kernel_are_compiled_once_each_behind_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    compiled: list[int] = []

    def compile_cubin(file: Path, arch: str, macros: dict[str, int]) -> bytes:
        compiled.append(macros["ROWS"])
        return b"form %d" % macros["ROWS"]

    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(notices, "_said", set())
    monkeypatch.setattr(compiler, "compile_cubin", compile_cubin)
    monkeypatch.setattr(compiler, "nvrtc_version", lambda: "13.0")
    (tmp_path / "ops").mkdir()
    (file := tmp_path / "ops" / "project.cu").write_text("// a kernel")
    for rows in (1, 2, 3, 1, 2):
        assert compiler.cubin(file, "sm_90", {"ROWS": rows}) == b"form %d" % rows
    assert compiled == [1, 2, 3]
    line = "statespan: compiling ops.project for sm_90 (once"
    assert capfd.readouterr().err == f"{line}; cached in {tmp_path / 'statespan'})\n"


def test_writers_of_one_kernel_are_not_in_each_others_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads, and processes of the same number in containers: what one has half written, no other may put in place."""
    written: list[Path] = []
    write = Path.write_bytes
    monkeypatch.setattr(Path, "write_bytes", lambda path, code: written.append(path) or write(path, code))
    path = tmp_path / "ops.project.sm_90.0123.cubin"
    for _ in range(2):
        kernel_cache.store(path, b"code")
    assert len({path, *written}) == 3 and [*tmp_path.iterdir()] == [path] and path.read_bytes() == b"code"
