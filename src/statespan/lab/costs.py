"""What RNN, Transformer, S4D and Mamba cost: training against length, a generated token against what came before."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from statespan.errors import UserError
from statespan.lab import rows as table
from statespan.lab.experiment import Check, Experiment, Findings, Plot, Progress, Row, Setting, Table
from statespan.lab.three_views import measure
from statespan.layers.config import AttentionConfig, MLPConfig, S4DConfig
from statespan.layers.state import ModelState
from statespan.models.build import build
from statespan.models.config import ModelConfig
from statespan.models.language_model import LanguageModel
from statespan.models.layer_pattern import LayerSpec

VARIANTS = {
    "lstm": "LSTM",
    "transformer": "attention with rotary positions, and MLPs",
    "s4d": "S4D, and MLPs",
    "mamba": "Mamba-1",
    "mamba2": "Mamba-2",
}
Exponents = tuple[float | None, float | None, float | None]  # of training, of a generated token, of its state
PUBLISHED = {  # work of training, a generated token, its memory; L the length, t the tokens so far
    "lstm": ("O(L), one after the other", "O(1)", "O(1)"),
    "transformer": ("O(L^2)", "O(t)", "O(t)"),
    "s4d": ("O(L log L)", "O(1)", "O(1)"),
    "mamba": ("O(L)", "O(1)", "O(1)"),
    "mamba2": ("O(L)", "O(1)", "O(1)"),
}


@dataclass(frozen=True, kw_only=True)
class CostsSetting(Setting):
    """Sizes of the models, and lengths."""

    hidden_size: int = 384
    num_layers: int = 6
    num_heads: int = 6
    lengths: tuple[int, ...] = (512, 1024, 2048, 4096, 8192, 16384, 32768)  # of training
    batch_tokens: int = 32768  # a batch of training: rows = batch_tokens / length, at least 1
    contexts: tuple[int, ...] = (1024, 4096, 16384, 65536)  # tokens before the generated ones
    decode_rows: int = 16
    decode_tokens: int = 16
    longest_lstm: int = 8192
    precision: str = "bfloat16"
    repeats: int = 3

    def __post_init__(self) -> None:
        super().__post_init__()
        if min((1, *self.lengths, *self.contexts, self.num_layers, self.repeats, self.decode_tokens)) < 1:
            raise UserError("lengths, contexts, num_layers, decode_tokens and repeats must be at least 1")
        if min(self.lengths, default=0) < 2:
            raise UserError("lengths need at least 2 tokens: one predicts the next")
        if self.precision not in ("float32", "bfloat16"):
            raise UserError(f"precision must be float32 or bfloat16, got {self.precision!r}")
        model_config(self, "transformer")


def model_config(setting: CostsSetting, variant: str) -> ModelConfig:
    """Models of about the same number of parameters a layer pair."""
    half, layers = max(1, setting.num_layers // 2), setting.num_layers
    pattern = {
        "lstm": (LayerSpec("lstm"),) * layers,
        "transformer": (LayerSpec("attention", "mlp"),) * half,
        "s4d": (LayerSpec("s4d", "mlp"),) * half,
        "mamba": (LayerSpec("mamba1"),) * layers,
        "mamba2": (LayerSpec("mamba2"),) * layers,
    }[variant]
    return ModelConfig(
        hidden_size=setting.hidden_size,
        layers=pattern,
        attention=AttentionConfig(num_heads=setting.num_heads, rope_theta=10_000.0),
        s4d=S4DConfig(block="mamba", expand=1),
        mlp=MLPConfig(intermediate_size=8 * setting.hidden_size // 3),
    )


def run(setting: CostsSetting, variant: str, seed: int, progress: Progress) -> Iterator[Row]:
    """Time, and on a GPU memory, of a training step at each length, and of a generated token after each context."""
    device = torch.device(setting.device)
    model = build(model_config(setting, variant), seed=seed, device=device)
    yield {"parameters": sum(parameter.numel() for parameter in model.parameters())}
    lengths = [n for n in setting.lengths if variant != "lstm" or n <= setting.longest_lstm]
    count = len(lengths) + len(setting.contexts)
    for index, length in enumerate(lengths):
        progress(index / count, f"training on {length} tokens")
        # An LSTM's time is that of its steps, however many rows take them: the same rows at all lengths.
        rows = setting.batch_tokens // (setting.longest_lstm if variant == "lstm" else length)
        yield {"length": length} | _training(model, setting, max(1, rows), length, device)
    for index, context in enumerate(setting.contexts):
        progress((len(lengths) + index) / count, f"generating after {context} tokens")
        yield {"context": context} | _generating(model, setting, context, device)


def _training(model: LanguageModel, setting: CostsSetting, rows: int, length: int, device: torch.device) -> Row:
    input_ids = torch.randint(0, 256, (rows, length), device=device)
    half = setting.precision == "bfloat16"

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=half):
            output = model(input_ids, labels=input_ids)
        assert output.loss is not None  # labels were given
        output.loss.backward()
        model.zero_grad()

    found = measure(step, device, setting.repeats)
    return {"us_per_token": 1e3 * found["ms"] / (rows * length)} | {f"training_{k}": v for k, v in found.items()}


@torch.no_grad()
def _generating(model: LanguageModel, setting: CostsSetting, context: int, device: torch.device) -> Row:
    """A decoder fed some tokens, from a state with `context` tokens before it; its rows are copies of one."""
    model.eval()
    state, prompt = model.new_state(1), torch.randint(0, 256, (1, context), device=device)
    for chunk in prompt.split(2048, dim=1):
        after = model(chunk, state=state, logits_at="none").state
        assert isinstance(after, ModelState)  # a state was given
        state = after
    state = state.select(torch.zeros(setting.decode_rows, dtype=torch.int64))
    num_bytes = state_bytes(state, context) / setting.decode_rows
    token = torch.zeros(setting.decode_rows, dtype=torch.int64, device=device)

    decoder = model.decoder(setting.decode_rows)
    decoder.start(state, room=setting.decode_tokens * (setting.repeats + 1))
    step = decoder.captured(lambda: decoder(token))

    def tokens() -> None:
        for _ in range(setting.decode_tokens):
            step()

    found = measure(tokens, device, setting.repeats)
    model.train()
    return {"ms_per_token": found["ms"] / setting.decode_tokens, "state_kib": num_bytes / 1024}


def state_bytes(state: ModelState, context: int) -> float:
    """Bytes of a state, of a cache of keys and values only the slots in use."""
    total = 0.0
    for layer in state.layers:
        for name, tensor in layer.tensors().items() if layer is not None else ():
            size = tensor.numel() * tensor.element_size()
            grows = name in ("key", "value", "position")
            total += size * context / max(tensor.shape[1], 1) if grows else size
    return total


def report(setting: CostsSetting, rows: Sequence[Row]) -> Findings:
    """Exponents of the last lengths beside the table's."""
    present = [variant for variant in VARIANTS if table.of(rows, variant=variant)]
    exponents = {variant: _exponents(table.of(rows, variant=variant)) for variant in present}

    def plot(title: str, x: str, y: str, x_field: str, y_field: str) -> Plot:
        return Plot(title, x, y, table.lines(present, rows, x_field, y_field), log_x=True, log_y=True)

    def by_length(field: str, y_field: str, lengths: Sequence[int]) -> list[list[str | float | None]]:
        return [[f"{n:,}", *(table.mean_of(rows, y_field, variant=v, **{field: n}) for v in present)] for n in lengths]

    return Findings(
        _checks(exponents),
        [
            _table_of_exponents(rows, exponents),
            Table(
                "Training, microseconds a token",
                ["tokens a row", *present],
                by_length("length", "us_per_token", setting.lengths),
                digits=2,
            ),
            Table(
                f"Generating {setting.decode_rows} rows, milliseconds a step",
                ["tokens before", *present],
                by_length("context", "ms_per_token", setting.contexts),
                digits=3,
            ),
        ],
        [
            plot("Training", "tokens a row", "microseconds a token", "length", "us_per_token"),
            plot("Generating", "tokens before", "ms a step", "context", "ms_per_token"),
            plot("State of a row", "tokens before", "KiB", "context", "state_kib"),
        ],
    )


def _checks(exponents: Mapping[str, Exponents]) -> list[Check]:
    checks: list[Check] = []
    for text, index, limit in (
        ("memory of the state does not grow", 2, 0.05),
        ("training grows like the length (exponent below 1.3)", 0, 1.3),
    ):
        for variant in (variant for variant in exponents if variant != "transformer"):
            found = exponents[variant][index]
            held = None if found is None else found < limit
            checks.append(Check(f"{variant}: {text}", held, _told(found, "exponent "), PUBLISHED[variant][index]))
    training, _, cache = exponents.get("transformer", (None, None, None))
    tokens = None if cache is None else 0.9 < cache < 1.1
    faster = table.ordered(training, 1.1)
    return [
        *checks,
        Check("transformer: the cache grows like the tokens (0.9 to 1.1)", tokens, _told(cache, "exponent "), "O(t)"),
        Check("transformer: training grows faster than the length", faster, _told(training, "exponent "), "O(L^2)"),
    ]


def _table_of_exponents(rows: Sequence[Row], exponents: Mapping[str, Exponents]) -> Table:
    cells: list[list[str | float | None]] = []
    for variant, found in exponents.items():
        size = f"{max(table.values(rows, 'parameters', variant=variant)):,}"
        beside = [text for pair in zip(map(_told, found), PUBLISHED[variant], strict=True) for text in pair]
        cells.append([VARIANTS[variant], size, *beside])
    exponent_columns = ("training ~ L^k: k", "a token ~ t^k: k", "state ~ t^k: k")
    columns = ["model", "parameters", *(text for column in exponent_columns for text in (column, "table"))]
    return Table("Exponents, from the last three lengths", columns, cells)


def _exponents(rows: Sequence[Row]) -> Exponents:
    """Of training a row, whose work is that of a token times the length, of a generated token, and of its state."""
    a_token = _exponent(rows, "length", "us_per_token")
    training = None if a_token is None else 1 + a_token
    return training, _exponent(rows, "context", "ms_per_token"), _exponent(rows, "context", "state_kib")


def _exponent(rows: Sequence[Row], x: str, y: str) -> float | None:
    curve = table.line("", rows, x, y)
    return table.slope(curve.x[-3:], [value for value in curve.y[-3:] if value is not None])


def _told(exponent: float | None, before: str = "") -> str:
    return "" if exponent is None else f"{before}{round(exponent, 2) + 0.0:.2f}"


H100 = CostsSetting(
    time="60 seconds of an H100",
    variants=tuple(VARIANTS),
    device="cuda",
    lengths=(512, 1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072),
    longest_lstm=2048,
    repeats=2,
)
CPU = replace(
    H100,
    time="60 s of 2 cores",
    device="cpu",
    hidden_size=64,
    num_layers=2,
    num_heads=4,
    lengths=(512, 1024, 2048, 4096, 8192),
    batch_tokens=8192,
    contexts=(1024, 4096, 16384),
    decode_rows=4,
    decode_tokens=8,
    longest_lstm=4096,
    precision="float32",
    repeats=2,
)

EXPERIMENT = Experiment(
    name="costs",
    title="RNN, Transformer, S4D, Mamba: what they cost",
    claim="Attention costs the square of the length in training, and a token more the more came before; recurrent "
    "networks and state-space models cost the same a token and keep a state of fixed size.",
    source="Mamba, arXiv 2312.00752, sections 1 and 4.5; S4, arXiv 2111.00396, table 1",
    settings={
        "cpu": CPU,
        "h100": H100,
        "tiny": replace(
            CPU,
            time="a second",
            variants=("lstm", "transformer", "mamba"),
            hidden_size=16,
            lengths=(4, 8),
            batch_tokens=8,
            contexts=(4, 8),
            decode_rows=2,
            decode_tokens=2,
            repeats=1,
        ),
    },
    variants=VARIANTS,
    run=run,
    report=report,
    timed=True,
    notes={
        "cpu": "Projections and MLPs cost the same a token whatever the length, and hide the square of attention at "
        "short lengths; exponents are of the largest lengths here, and times of one machine under its load.",
        "h100": "A batch has 32,768 tokens, and beyond that length one row. Up to there a step of these small models "
        "takes as long as the host needs to launch it, so that a token costs the same; longer rows fill the card, and "
        "a token of S4D and Mamba gets cheaper: exponents below 1 say this, not that the work grows slower than the "
        "length. LSTM and S4D generate without a graph, the others with one.",
    },
)
