"""The examples of docstrings run and print what they say; options are told where they are given."""

import ast
import doctest
from dataclasses import fields
from importlib import import_module
from pathlib import Path

import pytest

import statespan
from statespan.generation import GenerationOptions

SOURCE = Path(statespan.__file__).parents[1]
EXAMPLES = {
    f"{path.relative_to(SOURCE).as_posix()}:{node.name}": (path, docstring)
    for path in sorted((SOURCE / "statespan").rglob("*.py"))
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    if isinstance(node, ast.FunctionDef | ast.ClassDef) and ">>>" in (docstring := ast.get_docstring(node) or "")
}


@pytest.mark.parametrize("name", EXAMPLES)
def test_examples_run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As they stand in the module, whose own names they may use."""
    path, docstring = EXAMPLES[name]
    monkeypatch.chdir(tmp_path)
    parts = path.relative_to(SOURCE).with_suffix("").parts
    module = import_module(".".join(parts[:-1] if parts[-1] == "__init__" else parts))
    example = doctest.DocTestParser().get_doctest(docstring, dict(vars(module)), name, str(path), 0)
    assert doctest.DocTestRunner().run(example).failed == 0


def test_every_option_of_generation_is_told() -> None:
    told = statespan.generate.__doc__ or ""
    assert not [option.name for option in fields(GenerationOptions) if option.name not in told]
