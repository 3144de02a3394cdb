"""The formats of checkpoints; one file for each kin."""

from statespan.checkpoints.families.blackmamba import BLACKMAMBA
from statespan.checkpoints.families.family import Family
from statespan.checkpoints.families.jamba import JAMBA
from statespan.checkpoints.families.mamba import MAMBA, MAMBA2
from statespan.checkpoints.families.native import NATIVE
from statespan.checkpoints.families.state_spaces import STATE_SPACES
from statespan.checkpoints.families.transformer import LLAMA, MISTRAL, MIXTRAL
from statespan.checkpoints.families.writers import transformers_family

FAMILIES: tuple[Family, ...] = (
    NATIVE,
    BLACKMAMBA,
    STATE_SPACES,
    MAMBA,
    MAMBA2,
    JAMBA,
    MIXTRAL,
    LLAMA,
    MISTRAL,
)

__all__ = ["FAMILIES", "Family", "transformers_family"]
