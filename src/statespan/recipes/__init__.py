"""Recipes: a run is a Python function that returns the whole TrainingConfig, named model_size_hardware.

    statespan train mambabyte_tiny_cpu data.train=book.txt run.max_steps=500
    statespan train my_runs.py:small data.train=book.txt

The second line takes the function `small` of the user's own file my_runs.py.
"""

import importlib.util
from collections.abc import Callable
from inspect import signature
from pathlib import Path

from statespan.errors import UnknownName, UserError
from statespan.recipes import baselines, h100, jamba, mamba, s4
from statespan.training.config import TrainingConfig

Recipe = Callable[[], TrainingConfig]  # a run; its docstring's first line says what it is

RECIPES: dict[str, Recipe] = {
    recipe.__name__: recipe
    for recipe in (
        mamba.mambabyte_tiny_cpu,
        mamba.mamba2_tiny_cpu,
        mamba.mamba_130m_cpu,
        s4.s4d_tiny_cpu,
        jamba.jamba_small_cpu,
        jamba.moe_mamba_tiny_cpu,
        baselines.transformer_tiny_cpu,
        baselines.lstm_tiny_cpu,
        baselines.gru_tiny_cpu,
        h100.mamba_100m_h100,
        h100.mamba2_100m_h100,
        h100.jamba_100m_h100,
        h100.transformer_100m_h100,
    )
}

__all__ = ["RECIPES", "Recipe", "load_recipe", "recipes"]


def recipes() -> dict[str, str]:
    """Every recipe's name with what it is in one line.

    Example:
        >>> recipes()["mambabyte_tiny_cpu"]
        'Mamba-1 on bytes, 0.5M parameters: the smallest thing that learns to spell.'
    """
    return {name: (recipe.__doc__ or "").strip().splitlines()[0] for name, recipe in RECIPES.items()}


def load_recipe(name: str) -> TrainingConfig:
    """The config of a recipe.

    Args:
        name: one of `recipes()`, or `path/to/file.py:function` of the user's own.
    Returns:
        The whole run; `override` changes fields.
    Raises:
        UnknownName: no recipe has that name; the message offers the nearest.
        UserError: the file or function is no recipe.

    Example:
        >>> load_recipe("mambabyte_tiny_cpu").model.vocab_size
        256
    """
    path, separator, function = name.rpartition(":")
    if separator and path.endswith(".py"):
        return _from_file(Path(path), function)
    if name.endswith(".py"):
        raise UserError(f"{name}: say which function of the file, as in {name}:my_recipe")
    if name not in RECIPES:
        raise UnknownName("recipe", name, RECIPES)
    return RECIPES[name]()


def _from_file(path: Path, function: str) -> TrainingConfig:
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    spec = importlib.util.spec_from_file_location(f"statespan_recipe_{path.stem}", path)
    assert spec is not None and spec.loader is not None  # a path that ends in .py has a loader
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except (ImportError, SyntaxError) as error:
        raise UserError(f"{path} cannot be imported: {error}") from None
    functions = {key: value for key, value in vars(module).items() if callable(value) and not key.startswith("_")}
    if function not in functions:
        raise UnknownName(f"function in {path}", function, functions)
    try:
        signature(functions[function]).bind()
    except TypeError as error:
        raise UserError(f"{path}:{function}: {error}; a recipe is called without arguments") from None
    config = functions[function]()
    if not isinstance(config, TrainingConfig):
        raise UserError(f"{path}:{function} returns {type(config).__name__}; a recipe returns a TrainingConfig")
    return config
