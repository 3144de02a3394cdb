"""Statespan: train, run and serve the Mamba and Jamba family of state-space models, in pure Python.

The public names are imported when first used, so that `import statespan` is quick, touches no device and sets up no
logging.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from statespan import ops
    from statespan.checkpoints import convert, load, save
    from statespan.errors import UserError
    from statespan.generation import generate, generate_stream
    from statespan.models.build import build
    from statespan.models.config import ModelConfig
    from statespan.models.language_model import LanguageModel
    from statespan.models.presets import presets
    from statespan.models.quantize import quantize

__version__ = "0.1.0"

__all__ = [
    "LanguageModel",
    "ModelConfig",
    "UserError",
    "__version__",
    "build",
    "convert",
    "generate",
    "generate_stream",
    "load",
    "ops",
    "presets",
    "quantize",
    "save",
]

_HOMES = {
    "LanguageModel": "statespan.models.language_model",
    "ModelConfig": "statespan.models.config",
    "UserError": "statespan.errors",
    "build": "statespan.models.build",
    "convert": "statespan.checkpoints",
    "generate": "statespan.generation",
    "generate_stream": "statespan.generation",
    "load": "statespan.checkpoints",
    "presets": "statespan.models.presets",
    "quantize": "statespan.models.quantize",
    "save": "statespan.checkpoints",
}


def __getattr__(name: str) -> Any:
    if name == "ops":
        return import_module("statespan.ops")
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'statespan' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
