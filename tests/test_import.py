"""`import statespan` is quick, and brings in neither the heavy libraries nor a device."""

import json
import subprocess
import sys
from pathlib import Path

import statespan

HEAVY = ["numba", "datasets", "transformers", "matplotlib", "tensorboard", "rich", "tokenizers", "pandas"]


def in_fresh_interpreter(code: str) -> dict[str, object]:
    """Run `code`, which leaves its findings in `found`, and return them."""
    script = f"import sys, json, time\nfound = {{}}\n{code}\nprint(json.dumps(found))"
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


def test_import_brings_in_nothing_heavy() -> None:
    names = [*HEAVY, "torch", "numpy"]
    found = in_fresh_interpreter(f"import statespan\nfound['loaded'] = [n for n in {names} if n in sys.modules]")
    assert found["loaded"] == []


def test_public_names_bring_in_nothing_heavy_but_torch(tmp_path: Path) -> None:
    code = f"""
begin = time.process_time()
import torch
before, start = set(sys.modules), time.process_time()
sys.dont_write_bytecode, sys.pycache_prefix = False, {str(tmp_path)!r}
import statespan
statespan.ops, statespan.build, statespan.generate
found["share"] = (time.process_time() - start) / (start - begin)
[getattr(statespan, name) for name in statespan.__all__]
packages = {{name.partition(".")[0] for name in sys.modules.keys() - before}}
found["packages"] = sorted(packages - sys.stdlib_module_names)
found["cuda"] = torch.cuda.is_initialized()
"""
    runs = [in_fresh_interpreter(code) for _ in range(3)]  # the first compiles
    assert runs[0]["packages"] == ["safetensors", "statespan"]
    assert runs[0]["cuda"] is False
    # In parts of what torch took of the same processor: 6% here, and the least of three, so that a slow or busy machine
    # does not count.
    assert min(float(str(found["share"])) for found in runs) < 0.125


def test_command_line_help_needs_no_torch() -> None:
    code = """
import io, contextlib
from statespan.cli import main
with contextlib.redirect_stdout(io.StringIO()) as out:
    found["code"] = main([])
found["torch"] = "torch" in sys.modules
"""
    assert in_fresh_interpreter(code) == {"code": 0, "torch": False}


def test_public_names_resolve_and_an_unknown_one_does_not() -> None:
    assert set(statespan.__all__) <= set(dir(statespan))
    for name in statespan.__all__:
        assert getattr(statespan, name) is not None
    assert not hasattr(statespan, "no_such_name")


def test_import_sets_up_no_logging() -> None:
    found = in_fresh_interpreter("import statespan, logging\nfound['handlers'] = len(logging.getLogger().handlers)")
    assert found["handlers"] == 0
