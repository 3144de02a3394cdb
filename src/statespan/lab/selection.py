"""Which parameters are selective, how large the state is, where A starts: the ablations of Mamba on a byte corpus."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from statespan.lab import rows as table
from statespan.lab.experiment import Check, Experiment, Findings, Plot, Progress, Row, Table
from statespan.lab.text_results import HeldOut
from statespan.lab.text_training import SubwordSetting, subwords, text_settings, train_on_text
from statespan.layers.config import Mamba1Config
from statespan.layers.mamba1 import Mamba1
from statespan.models.config import ModelConfig
from statespan.models.language_model import LanguageModel
from statespan.models.layer_pattern import LayerSpec

VARIANTS = {
    "all": "dt, B and C selective, N = 16, A = -(n+1): Mamba",
    "dt": "dt alone selective",
    "B": "B alone selective",
    "C": "C alone selective",
    "none": "nothing selective",
    "n1": "N = 1",
    "n2": "N = 2",
    "n4": "N = 4",
    "n8": "N = 8",
    "dt_n1": "dt alone selective, N = 1",
    "a_half": "A starts at -1/2",
    "a_random": "A starts at -exp(N(0, 1))",
}
SIZES = ("n1", "n2", "n4", "n8", "all")  # of the state, all else selective
ONE = ("dt", "B", "C")  # alone selective
SELECTED = {"dt": "dt", "dt_n1": "dt", "B": "B", "C": "C", "none": ""}  # the others: all three
PUBLISHED = {  # perplexity at 350M parameters; arXiv 2312.00752, tables 7, 8 and 10
    "all": 8.71,
    "dt": 9.81,
    "B": 10.15,
    "C": 9.98,
    "none": 10.93,
    "n1": 9.73,
    "n2": 9.40,
    "n4": 9.09,
    "n8": 8.84,
    "dt_n1": 9.88,
    "a_half": 8.85,
    "a_random": 8.71,
}

HALF = "bytes ask for longer memories than subwords, on which it comes out (setting subwords)"


@dataclass(frozen=True, kw_only=True)
class SelectionSetting(SubwordSetting):
    """Size of the model, and whether it reads bytes or subwords."""

    hidden_size: int = 384
    num_layers: int = 6
    tokens: Literal["bytes", "subwords"] = "bytes"

    def model(self, state_size: int) -> ModelConfig:
        return ModelConfig(
            vocab_size=256 if self.tokens == "bytes" else self.vocab_size,
            hidden_size=self.hidden_size,
            layers=(LayerSpec("mamba1"),) * self.num_layers,
            mamba1=Mamba1Config(state_size=state_size),
        )


class PartlySelective(nn.Module):
    """Stands in for x_proj, [dt | B | C]: those that are not selected are trained constants, the same at all times.

    Constants start where the S4 family starts: B at 1, C normal; dt at 0, so that softplus(dt_bias) is the step size.
    """

    def __init__(self, projection: nn.Linear, mixer: Mamba1, selected: str, seed: int) -> None:
        super().__init__()
        self.projection = projection
        rank, states = mixer.rank, mixer.state_size
        random = torch.Generator().manual_seed(seed)
        parts = {"dt": torch.zeros(rank), "B": torch.ones(states), "C": torch.randn(states, generator=random)}
        chosen = {name: name == selected for name in parts}
        mask = torch.cat([torch.full_like(part, float(chosen[name])) for name, part in parts.items()])
        constant = torch.cat([torch.zeros_like(p) if chosen[name] else p for name, p in parts.items()])
        self.mask: Tensor
        self.register_buffer("mask", mask.to(projection.weight.device))
        self.constant_bias = nn.Parameter(constant.to(projection.weight.device))

    def forward(self, x: Tensor) -> Tensor:
        projected = self.projection(x)
        return projected * self.mask.to(projected.dtype) + (self.constant_bias * (1 - self.mask)).to(projected.dtype)


def adapt(model: LanguageModel, variant: str, seed: int) -> None:
    """Make a fresh Mamba into the variant, in place."""
    random = torch.Generator().manual_seed(seed)
    for index, block in enumerate(model.layers):
        mixer = block.mixer
        assert isinstance(mixer, Mamba1)  # of every layer here
        if variant in SELECTED:
            stand_in = PartlySelective(mixer.x_proj, mixer, SELECTED[variant], seed + index)
            mixer.x_proj = stand_in  # type: ignore[assignment]  # the mixer calls it as it calls a Linear
        with torch.no_grad():
            if variant == "a_half":
                mixer.A_log.fill_(torch.tensor(0.5).log())
            elif variant == "a_random":
                mixer.A_log.copy_(torch.randn(mixer.A_log.shape, generator=random))


def state_size(variant: str) -> int:
    return {"n1": 1, "n2": 2, "n4": 4, "n8": 8, "dt_n1": 1}.get(variant, 16)


def run(setting: SelectionSetting, variant: str, seed: int, progress: Progress) -> Iterator[Row]:
    """Train one variant."""
    _, rows = train_on_text(
        setting,
        setting.model(state_size(variant)),
        seed,
        progress,
        adapt=lambda model: adapt(model, variant, seed),
        tokenizer="bytes" if setting.tokens == "bytes" else subwords(setting),
    )
    yield from rows


def report(setting: SelectionSetting, rows: Sequence[Row]) -> Findings:
    """Held-out figures beside the published perplexities, and their order."""
    text = HeldOut(rows, VARIANTS)

    def check(claim: str, passed: bool | None, *variants: str, why: str = "") -> Check:
        published = table.told({variant: PUBLISHED[variant] for variant in variants}, 2)
        return Check(claim, passed, text.told(*variants), published, why)

    checks = [
        check(
            "all three selective better than any one alone",
            table.all_of(*(text.falls(v, "all") for v in ONE)),
            "all",
            *ONE,
        ),
        check(
            "dt alone better than B alone or C alone",
            table.all_of(text.falls("B", "dt"), text.falls("C", "dt")),
            *ONE,
        ),
        check("C alone better than B alone", text.falls("B", "C"), "B", "C"),
        check(
            "nothing selective is worst", table.all_of(*(text.falls("none", v) for v in ("all", *ONE))), "none", *ONE
        ),
        check("a larger state is better: N = 1, 2, 4, 8, 16", text.falls(*SIZES), *SIZES),
        check("A = -(n+1) better than A = -1/2", text.falls("a_half", "all"), "all", "a_half", why=HALF),
    ]
    cells = [
        [VARIANTS[variant], text.figure(variant), f"{PUBLISHED[variant]:.2f}", text.parameters(variant)]
        for variant in text.present
    ]
    columns = ["variant", "held-out bits per byte", "published perplexity, 350M", "parameters"]
    plots = text.plots("all")
    states = [row | {"n": state_size(row["variant"])} for row in rows if row["variant"] in SIZES]
    size = table.line("B, C and dt selective", states, "n", "held_out")
    if len(size.x) > 1:
        plots.append(Plot("Size of the state", "N", "held-out bits per byte", [size], log_x=True))
    return Findings(checks, [Table("", columns, cells)], plots)


SETTINGS = text_settings(
    SelectionSetting,
    h100={
        "time": "6 minutes of an H100 (estimated; 5 of an H200, 3 jobs side by side)",
        "variants": tuple(VARIANTS),
    },
    cpu={
        "variants": ("all", "dt", "B", "C", "none"),
        "hidden_size": 64,
        "num_layers": 2,
        "steps": 250,
        "learning_rate": 6e-3,
    },
    tiny={"variants": ("all", "B")},
)
# What must be remembered lies nearer than in bytes.
SUBWORDS = replace(
    SETTINGS["cpu"],
    time="3 minutes of 2 cores",
    variants=("all", "a_half", "a_random"),
    seeds=3,
    tokens="subwords",
    vocab_size=1024,
    tokenizer_bytes=500_000,
)

EXPERIMENT = Experiment(
    name="selection",
    title="What selection is made of",
    claim="Of dt, B and C, a selective dt matters most, C more than B, and all three together most of all. A larger "
    "state helps where B and C are selective. A starts best from a spread of real decays.",
    source="Mamba, arXiv 2312.00752, tables 7, 8 and 10",
    settings=SETTINGS | {"subwords": SUBWORDS},
    variants=VARIANTS,
    run=run,
    report=report,
    notes={
        "cpu": "Two layers and a few seconds of training a variant: on a GPU too a selective dt alone is ahead for the "
        "first 700 steps, and the published order comes after that.",
        "h100": "6M parameters and 16 million bytes of Python source (of the packages installed there, split by file), "
        "where the paper has 350M on subwords. The second panel, seed by seed on the same rows, shows the gaps grow "
        "with training: the order is not there before some 800 steps. Every larger state is better in every seed; B "
        "alone and C alone lie within each other's range. A that starts at -1/2, so that all states last long, is "
        "ahead in every seed, by 2.7% of the loss; in the paper it is behind, by 0.7%. That is the bytes: a subword "
        "spans three or four of them, and on subwords -(n+1) is ahead (setting subwords). What is not selective is "
        "one trained constant a layer, shared by the channels as the selective B and C are. Complex A is not there: "
        "the selective scan is real.",
        "subwords": "The sizes of the CPU setting, but for the subwords: -(n+1) is ahead of -1/2 in every seed. On "
        "bytes the two lie together at this size, 2.521 and 2.519, each within the other's range.",
    },
)
