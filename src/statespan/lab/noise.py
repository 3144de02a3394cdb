"""Bytes against subwords when the text is noisy."""

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from statespan.errors import UserError
from statespan.lab import rows as table
from statespan.lab.experiment import Check, Experiment, Findings, Plot, Progress, Row, Table
from statespan.lab.text_training import SubwordSetting, corpora, subwords, text_settings, train_on_text
from statespan.models.config import ModelConfig
from statespan.models.layer_pattern import LayerSpec
from statespan.training import evaluate
from statespan.training.data import build_corpus, load_tokenizer
from statespan.training.run import sample
from statespan.training.trainer import PRECISIONS

VARIANTS = {"bytes": "Mamba on bytes", "subwords": "Mamba on subwords"}
PUBLISHED = {  # growth of the perplexity of words, bytes and subwords; arXiv 2401.13660, table of noise
    "antspeak": ("+28.3", "+58,300"),
    "drop": ("+31.7", "+213"),
    "swap": ("+28.7", "+630.6"),
    "case": ("+7.7", "+20.8"),
}
NOISES = {
    "antspeak": "every character in capitals, and a space after it",
    "drop": "characters left out",
    "swap": "neighbours exchanged",
    "case": "capital or small at random, each letter",
}


@dataclass(frozen=True, kw_only=True)
class NoiseSetting(SubwordSetting):
    """Size of the models and of the noise."""

    hidden_size: int = 384
    num_layers: int = 6
    share: float = 0.3  # of the characters dropped or swapped

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.share < 1:
            raise UserError(f"share must be above 0 and below 1, got {self.share}")


def disturb(text: str, noise: str, share: float, seed: int) -> str:
    """`text` with noise, the same for the same seed (arXiv 2401.13660, the section on noise).

    Args:
        text: any.
        noise: one of NOISES.
        share: of the characters that "drop" leaves out, or at which "swap" begins an exchange.
        seed: of the choice.
    """
    chance = random.Random(seed)
    match noise:
        case "antspeak":
            return "".join(f"{character.upper()} " for character in text)
        case "drop":
            return "".join(character for character in text if chance.random() >= share)
        case "swap":
            return _swapped(text, share, chance)
        case _:
            return "".join(c.upper() if chance.random() < 0.5 else c.lower() for c in text)


def _swapped(text: str, share: float, chance: random.Random) -> str:
    """Neighbours exchanged, no character twice, so that about `share` of all have moved."""
    characters, index = list(text), 0
    while index + 1 < len(characters):
        if chance.random() < share / 2:
            characters[index], characters[index + 1] = characters[index + 1], characters[index]
            index += 1
        index += 1
    return "".join(characters)


def tokenizer_of(setting: NoiseSetting, variant: str) -> str:
    """ "bytes", or the subwords' tokenizer.json."""
    return "bytes" if variant == "bytes" else subwords(setting)


def run(setting: NoiseSetting, variant: str, seed: int, progress: Progress) -> Iterator[Row]:
    """Train one model, then measure it on held-out text as it is and with each noise."""
    name = tokenizer_of(setting, variant)
    tokenizer = load_tokenizer(name)
    layers = (LayerSpec("mamba1"),) * setting.num_layers
    config = ModelConfig(vocab_size=tokenizer.vocab_size, hidden_size=setting.hidden_size, layers=layers)
    model, rows = train_on_text(setting, config, seed, lambda share, text: progress(0.8 * share, text), tokenizer=name)
    yield from rows
    _, held_out = corpora(setting)  # bytes
    part = sample(held_out, setting.held_out_bytes)
    texts = [part.document(index).tobytes().decode(errors="replace") for index in range(len(part))]
    num_words = sum(len(text.split()) for text in texts)
    for index, noise in enumerate(("", *NOISES)):
        progress(0.8 + 0.2 * index / len(NOISES), noise or "clean text")
        noisy = texts if not noise else [disturb(t, noise, setting.share, i) for i, t in enumerate(texts)]
        precision = PRECISIONS[setting.precision]
        found = evaluate(model, build_corpus(noisy, tokenizer), setting.evaluation(), precision=precision)
        bits = found.bits_per_byte * found.num_bytes
        yield {
            "noise": noise or "clean",
            "bits_per_byte_of_noise": found.bits_per_byte,
            "log_word_perplexity": bits * math.log(2) / num_words,
        }


def report(setting: NoiseSetting, rows: Sequence[Row]) -> Findings:
    """How much each noise costs, beside the published growth."""

    def cost(variant: str, noise: str) -> float | None:
        """Growth of the logarithm of the perplexity of words."""
        noisy, clean = (
            table.mean_of(rows, "log_word_perplexity", variant=variant, noise=name) for name in (noise, "clean")
        )
        return None if noisy is None or clean is None else noisy - clean

    checks = [
        Check(
            f"{noise}: bytes lose less than subwords",
            table.ordered(cost("subwords", noise), cost("bytes", noise)),
            table.told({variant: cost(variant, noise) for variant in VARIANTS}, 3),
            table.told(dict(zip(VARIANTS, PUBLISHED[noise], strict=True))),
        )
        for noise in NOISES
    ]
    cells: list[list[str | float | None]] = [
        [
            noise,
            NOISES.get(noise, ""),
            *(table.mean_of(rows, "bits_per_byte_of_noise", variant=variant, noise=noise) for variant in VARIANTS),
            *((cost(variant, noise) for variant in VARIANTS) if noise in NOISES else (None, None)),
            *PUBLISHED.get(noise, ("", "")),
        ]
        for noise in ("clean", *NOISES)
    ]
    columns = [
        "text",
        "what is done to it",
        *(f"{variant}: bits per byte" for variant in VARIANTS),
        *(f"{variant}: log of word perplexity grows by" for variant in VARIANTS),
        *(f"{variant}: published growth of perplexity" for variant in VARIANTS),
    ]
    clean = [table.line(v, rows, "step", "bits_per_byte", variant=v) for v in VARIANTS if table.of(rows, variant=v)]
    order = {noise: place for place, noise in enumerate(NOISES)}
    placed = [
        {"variant": variant, "place": order[noise], "cost": value}
        for variant in VARIANTS
        for noise in NOISES
        if (value := cost(variant, noise)) is not None
    ]
    lines = [table.line(v, placed, "place", "cost", variant=v) for v in VARIANTS if table.of(placed, variant=v)]
    return Findings(
        checks,
        [Table("", columns, cells, digits=3)],
        [
            Plot("Training text", "steps", "bits per byte", clean),
            Plot("Cost of noise", "noise", "growth of log word perplexity", lines, names=tuple(NOISES)),
        ],
    )


EXPERIMENT = Experiment(
    name="noise",
    title="Bytes against subwords under noise",
    claim="A model of bytes loses far less than one of subwords when letters are dropped, swapped, or change case.",
    source="MambaByte, arXiv 2401.13660, table on synthetic noise",
    settings=text_settings(
        NoiseSetting,
        h100={
            "time": "2 minutes of an H100 (estimated; 1.5 of an H200, 3 jobs side by side)",
            "variants": tuple(VARIANTS),
            "max_files": 2000,
            "held_out_bytes": 262_144,
        },
        cpu={
            "hidden_size": 64,
            "num_layers": 2,
            "vocab_size": 1024,
            "tokenizer_bytes": 500_000,
            "steps": 300,
            "learning_rate": 6e-3,
            "held_out_bytes": 32_768,
        },
        tiny={"num_layers": 1, "vocab_size": 300, "tokenizer_bytes": 20_000},
    ),
    variants=VARIANTS,
    run=run,
    report=report,
    notes={
        "cpu": "Both models see the same number of tokens, so the model of subwords sees more text. The paper's growth "
        "is of the perplexity of words, here it is of its logarithm: small models start from far larger perplexities. "
        "After so little training both models are lost in capitals with spaces between, and their order there says "
        "nothing.",
        "h100": "6M parameters and 16 million tokens of Python source: bytes for the one, about 3.5 times as "
        "much text for the other, which is the better one on clean text. The paper's growth is of the perplexity of "
        "words, here it is of its logarithm. Source code has few capitals, so case costs more than in the paper.",
    },
)
