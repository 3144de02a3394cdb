"""One layer in three views: recurrence, convolution and scan agree, and what each costs against the length."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from statespan.errors import UserError
from statespan.lab import rows as table
from statespan.lab.experiment import Check, Experiment, Findings, Plot, Progress, Row, Setting, Table
from statespan.layers.config import S4DConfig
from statespan.layers.s4 import S4D
from statespan.models.build import build
from statespan.models.config import ModelConfig
from statespan.models.layer_pattern import LayerSpec
from statespan.ops import selective_scan

TOLERANCE = 1e-10  # of the largest output, in float64
View = Callable[[Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class ThreeViewsSetting(Setting):
    """Sizes of the layer and lengths at which it is compared and timed."""

    batch_size: int = 1
    channels: int = 64
    state_size: int = 16
    lengths: tuple[int, ...] = (64, 256, 1024, 2048, 4096, 8192, 16384)
    longest_recurrence: int = 2048  # a token at a time takes long
    compared_length: int = 1000  # tokens of the comparison in float64
    repeats: int = 3

    def __post_init__(self) -> None:
        super().__post_init__()
        if min((self.compared_length, *self.lengths)) < 1:
            raise UserError("lengths and compared_length must be at least 1")
        if min(self.batch_size, self.channels, self.state_size, self.repeats) < 1:
            raise UserError("batch_size, channels, state_size and repeats must be at least 1")


def run(setting: ThreeViewsSetting, variant: str, seed: int, progress: Progress) -> Iterator[Row]:
    """The largest difference between this view and the recurrence, then time and memory at each length."""
    device, checked = torch.device(setting.device), torch.float64
    layer, exact = (_layer(setting, seed).to(device, dtype) for dtype in (torch.float32, checked))
    u = _input(setting, setting.compared_length, seed, device).to(checked)
    with torch.no_grad():
        truth = view_of("recurrence", exact)(u)
        difference = (view_of(variant, exact)(u) - truth).abs().max() / truth.abs().max()
        yield {"difference": difference.item()}
        lengths = [n for n in setting.lengths if variant != "recurrence" or n <= setting.longest_recurrence]
        for index, length in enumerate(lengths):
            progress(index / len(lengths), f"{length} tokens")
            u = _input(setting, length, seed, device)
            yield {"length": length} | measure(lambda u=u: view_of(variant, layer)(u), device, setting.repeats)


def _layer(setting: ThreeViewsSetting, seed: int) -> S4D:
    """A fresh S4D layer that all three views can run: real states, and one C for all channels, as in Mamba."""
    config = ModelConfig(
        hidden_size=setting.channels,
        layers=(LayerSpec("s4d"),),
        s4d=S4DConfig(state_size=setting.state_size, init="real"),
    )
    mixer = build(config, seed=seed).layers[0].mixer
    assert isinstance(mixer, S4D)  # the only layer
    with torch.no_grad():
        mixer.C.copy_(mixer.C[:1].expand_as(mixer.C))
    return mixer


def _input(setting: ThreeViewsSetting, length: int, seed: int, device: torch.device) -> Tensor:
    """Drawn where it is needed: a host takes seconds for what a GPU draws at once."""
    random = torch.Generator(device).manual_seed(seed)
    return torch.randn(setting.batch_size, length, setting.channels, generator=random, device=device)


def view_of(name: str, layer: S4D) -> View:
    """y = SSM(u) of the layer's system, u [b t d], without the block round it."""
    match name:
        case "recurrence":
            return lambda u: _recurrence(layer, u)
        case "convolution":
            return lambda u: layer.state_space(u, None, None)[0]
        case _:
            return lambda u: _scan(layer, u)


def _recurrence(layer: S4D, u: Tensor) -> Tensor:
    system = layer.system()
    state = torch.zeros(u.shape[0], *system.B.shape, dtype=system.B.dtype, device=u.device)
    outputs: list[Tensor] = []
    for token in u.unbind(1):
        y, state = system.step(state, token)
        outputs.append(y + layer.D * token)
    return torch.stack(outputs, dim=1)


def _scan(layer: S4D, u: Tensor) -> Tensor:
    """The scan that Mamba uses, with a step size, B and C that do not depend on the input."""
    A, dt = -torch.exp(layer.log_A_real), torch.exp(layer.log_dt)
    C = layer.C[0].expand(*u.shape[:2], 1, -1)
    return selective_scan(
        u, dt.expand_as(u), A, torch.ones_like(C), C, layer.D, dt_softplus=False, discretization="zoh"
    )


def measure(compute: Callable[[], object], device: torch.device, repeats: int) -> Row:
    """Milliseconds of the fastest of `repeats` calls after one to warm up; on a GPU also the most memory in MiB."""
    if device.type != "cuda":
        compute()
        return {"ms": min(_timed(compute) for _ in range(repeats)) * 1e3}
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    compute()
    torch.cuda.synchronize(device)
    peak = torch.cuda.max_memory_allocated(device) - before

    def waited() -> None:
        compute()
        torch.cuda.synchronize(device)

    return {"ms": min(_timed(waited) for _ in range(repeats)) * 1e3, "mib": peak / 2**20}


def _timed(compute: Callable[[], object]) -> float:
    started = time.perf_counter()
    compute()
    return time.perf_counter() - started


def report(setting: ThreeViewsSetting, rows: Sequence[Row]) -> Findings:
    """Agreement, times and their exponents."""
    checks: list[Check] = []
    summary: list[list[str | float | None]] = []
    for variant in VARIANTS:
        difference = max(table.values(rows, "difference", variant=variant), default=None)
        if variant != "recurrence":
            close = None if difference is None else difference < TOLERANCE
            ours = "" if difference is None else f"{difference:.0e}"
            checks.append(Check(f"{variant} equals the recurrence to {TOLERANCE:g} in float64", close, ours, "equal"))
        times = table.line(variant, rows, "length", "ms", variant=variant)
        exponent = table.slope(times.x[-3:], [value for value in times.y[-3:] if value is not None])
        told = None if difference is None else f"{difference:.1e}"
        summary.append([variant, told, None if exponent is None else f"{exponent:.2f}"])
    columns = ["tokens", *(f"{variant}, ms" for variant in VARIANTS)]
    timed = [
        [f"{length:,}", *(table.mean_of(rows, "ms", variant=variant, length=length) for variant in VARIANTS)]
        for length in setting.lengths
    ]
    plots = [_plot("Time of one layer", "ms", "ms", rows)]
    if table.values(rows, "mib"):
        plots.append(_plot("Most memory beside the input", "MiB", "mib", rows))
    return Findings(
        checks,
        [
            Table("", ["view", "largest difference / largest output", "time ~ length^k, k of the last three"], summary),
            Table("Milliseconds", columns, timed, digits=2),
        ],
        plots,
    )


def _plot(title: str, y_label: str, field: str, rows: Sequence[Row]) -> Plot:
    lines = table.lines(VARIANTS, rows, "length", field)
    return Plot(title, "tokens", y_label, lines, log_x=True, log_y=True)


VARIANTS = {
    "recurrence": "a token at a time, O(1) memory a token",
    "convolution": "by the FFT, O(t log t)",
    "scan": "the fused scan of Mamba, O(t)",
}

EXPERIMENT = Experiment(
    name="three_views",
    title="Three views of one layer",
    claim="A linear time-invariant layer run as recurrence, as convolution and as scan gives the same outputs. The "
    "views differ in what they cost: the recurrence is for generating, the others for whole sequences.",
    source="LSSL, arXiv 2110.13985, figure 1; S4, arXiv 2111.00396, figure 1",
    settings={
        "cpu": ThreeViewsSetting(time="10 s of 2 cores", variants=tuple(VARIANTS)),
        "h100": ThreeViewsSetting(
            time="5 seconds of an H100",
            variants=tuple(VARIANTS),
            device="cuda",
            batch_size=8,
            channels=1024,
            lengths=(512, 1024, 2048, 4096, 8192, 16384, 32768, 65536),
            longest_recurrence=2048,
            repeats=2,
        ),
        "tiny": ThreeViewsSetting(
            time="a second", variants=tuple(VARIANTS), channels=3, lengths=(3, 8), compared_length=33, repeats=1
        ),
    },
    variants=VARIANTS,
    run=run,
    report=report,
    timed=True,
    notes={"cpu": "The scan is the product's CPU kernel, the convolution PyTorch's FFT, the recurrence a Python loop."},
)
