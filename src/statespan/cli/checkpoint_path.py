"""Where the weights are that a user means."""

from pathlib import Path

from statespan.errors import UserError


def checkpoint_path(name: str) -> Path:
    """The folder of a checkpoint: `name` itself, or the newest checkpoint of a training run called so.

    Raises UserError for a preset's name, which has a shape and no weights.
    """
    from statespan.models.presets import PRESETS
    from statespan.training.resume import list_checkpoints

    path = Path(name)
    if not path.exists() and name in PRESETS:
        raise UserError(f"{name!r} is a preset, which has no weights; give the folder of a checkpoint")
    saved = list_checkpoints(path)
    return saved[-1] if saved else path
