"""Every recipe builds, trains a step, and is found by name; so is a user's own."""

from pathlib import Path

import pytest

from statespan.errors import UnknownName, UserError
from statespan.models.build import build
from statespan.recipes import RECIPES, load_recipe, recipes
from statespan.training import TrainingConfig, train

SIZES = {  # parameters; the docstrings round them
    "mambabyte_tiny_cpu": 0.5e6,
    "mamba2_tiny_cpu": 0.5e6,
    "mamba_130m_cpu": 129e6,
    "s4d_tiny_cpu": 0.6e6,
    "transformer_tiny_cpu": 0.6e6,
    "lstm_tiny_cpu": 0.6e6,
    "gru_tiny_cpu": 0.5e6,
    "mamba_100m_h100": 98e6,
    "mamba2_100m_h100": 98e6,
    "jamba_100m_h100": 177e6,
    "transformer_100m_h100": 99e6,
}


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_build_and_survive_json(name: str):
    config = load_recipe(name)
    config.override(["data.train=book.txt"]).check()
    assert TrainingConfig.from_dict(config.to_dict()) == config
    parameters = sum(p.numel() for p in build(config.model, device="meta").parameters())
    if name in SIZES:
        assert parameters == pytest.approx(SIZES[name], rel=0.1)
    assert recipes()[name].endswith(".")
    assert config.run.device == ("cpu" if name.endswith("_cpu") else "cuda")


@pytest.mark.parametrize("name", [name for name in RECIPES if "130m" not in name])
def test_recipes_learn(name: str, tmp_path: Path):
    (tmp_path / "book.txt").write_text("".join(f"line {i} of the book\n" for i in range(400)))
    settings = ["data.max_document_bytes=1000", "data.sequence_length=64", "run.max_steps=3", "run.batch_size=2"]
    settings += ["run.device=cpu", "run.cuda_graph=false", "run.precision=float32", "model.hidden_size=64"]
    config = load_recipe(name).override([*settings, f"data.train={tmp_path / 'book.txt'}"])
    result = train(config, tmp_path / "run")
    assert result.held_out is not None
    assert result.held_out.bits_per_byte < 8.0  # less than blind guessing, after three steps


def test_a_users_own_recipe(tmp_path: Path):
    path = tmp_path / "my_runs.py"
    path.write_text(
        "from statespan.recipes import load_recipe\n"
        "SIZE = 24\n"
        "def small():\n"
        "    return load_recipe('mambabyte_tiny_cpu').override([f'model.hidden_size={SIZE}'])\n"
        "def number():\n"
        "    return 3\n"
        "def sized(size):\n"
        "    return small()\n"
    )
    assert load_recipe(f"{path}:small").model.hidden_size == 24
    with pytest.raises(UserError, match=r"my_runs\.py:number returns int; a recipe returns a TrainingConfig"):
        load_recipe(f"{path}:number")
    with pytest.raises(UserError, match=r"my_runs\.py:sized: missing a required argument: 'size'; a recipe is called"):
        load_recipe(f"{path}:sized")
    with pytest.raises(UnknownName, match=r"function in .*my_runs\.py:? 'smal'; did you mean 'small'"):
        load_recipe(f"{path}:smal")
    with pytest.raises(UserError, match=r"say which function of the file"):
        load_recipe(str(path))
    with pytest.raises(UserError, match=r"nowhere\.py: no such file"):
        load_recipe(f"{tmp_path / 'nowhere.py'}:small")
    path.write_text("def small(:\n")
    with pytest.raises(UserError, match=r"my_runs\.py cannot be imported"):
        load_recipe(f"{path}:small")


def test_unknown_recipe_offers_the_nearest():
    with pytest.raises(UnknownName, match="did you mean 'mambabyte_tiny_cpu'"):
        load_recipe("mambabyte_tiny")
