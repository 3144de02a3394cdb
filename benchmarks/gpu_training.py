"""Four kinds of model of about 100M active parameters, each trained for five minutes on one GPU on Python source text.

    python -m benchmarks.gpu_training corpus corpus       # the source of the packages installed here, split by file
    statespan train mamba_100m_h100 data.train=corpus/train data.held_out=corpus/held-out
    python -m benchmarks.gpu_training report runs         # rows, and the curves as a picture

The second line four times, with `mamba2_100m_h100`, `jamba_100m_h100` and `transformer_100m_h100`: one after the other,
or side by side on as many GPUs. The split is by files, and training documents equal to held-out ones are left out.
"""

import argparse
import statistics
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.gpu_models import PACKAGES
from benchmarks.record import Row, report
from statespan.demo.corpus import compress, split_sources
from statespan.models.accounting import count_parameters
from statespan.training import TrainingConfig, read_metrics

FIGURE = Path(__file__).parents[1] / "docs" / "figures" / "training_gpu.png"
MAX_FILES = 8000
NAMES = {
    "mamba_100m_h100": "Mamba-1",
    "mamba2_100m_h100": "Mamba-2",
    "jamba_100m_h100": "Jamba, 1 attention in 8, experts",
    "transformer_100m_h100": "Transformer",
}


def corpus(folder: Path, root: Path, max_files: int) -> None:
    """Copy source files under `root`, without tests, to folder/train and folder/held-out."""
    split = split_sources(0, root, max_files)
    split.copy_to(folder)
    held_out = split.held_out_bytes()
    print(
        f"{len(split.train):,} files, {split.train_size():,} bytes; held out {len(split.held_out):,}, {len(held_out):,}"
    )
    sizes = compress(held_out)
    for name, size in (("gzip -9", sizes.gzip), ("xz -9", sizes.xz)):
        print(f"held-out files through {name}: {sizes.bits_per_byte(size):.3f} bits per byte")


def runs_of(folder: Path) -> dict[str, Path]:
    """The runs there, by recipe, in a fixed order."""
    return {name: folder / name for name in NAMES if (folder / name).is_dir()}


def evaluations(metrics: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], dict[str, Any] | None]:
    """Those of the sample, and that of the whole held-out text where the run came to it."""
    found = [row for row in metrics if "held_out.bits_per_byte" in row]
    size = found[0]["held_out.num_bytes"]
    whole = [row for row in found if row["held_out.num_bytes"] > size]
    return [row for row in found if row["held_out.num_bytes"] == size], whole[-1] if whole else None


def rows(folder: Path) -> Iterator[Row]:
    """What each run came to."""
    for recipe, run in runs_of(folder).items():
        config = TrainingConfig.load(run)
        metrics: list[dict[str, Any]] = read_metrics(run)
        training = [row for row in metrics if "tokens_per_s" in row]
        rates = [row["tokens_per_s"] for row in training[2:]]
        last, (sample, whole) = training[-1], evaluations(metrics)
        counts = count_parameters(config.model)
        note = f"{counts.active / 1e6:.0f}M active of {counts.total / 1e6:.0f}M parameters; {last['step']:,} steps,"
        note += f" {last['tokens'] / 1e6:.1f}M tokens in {last['seconds']:.0f} s"
        task = f"{recipe}, trained on Python source"
        for name, row in (("held-out sample", sample[-1]), ("held-out text", whole)):
            if row is not None:
                value, size = row["held_out.bits_per_byte"], row["held_out.num_bytes"]
                yield Row(task, name, value, "bits/byte", 0.0, f"{note}; {size:,} bytes, after step {row['step']:,}")
        rate = statistics.median(rates)
        yield Row(task, "training steps", rate, "tok/s", (max(rates) - min(rates)) / rate, "packed documents, AdamW")


def plot(folder: Path) -> None:
    """Held-out and training curves of the runs, as FIGURE."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.2), layout="constrained")
    by_time, by_tokens = figure.subplots(1, 2)
    for recipe, run in runs_of(folder).items():
        metrics: list[dict[str, Any]] = read_metrics(run)
        training = [row for row in metrics if "tokens_per_s" in row]
        places = {row["step"]: row for row in training}
        tested = [row for row in evaluations(metrics)[0] if row["step"] in places]
        for axes, key, unit in ((by_time, "seconds", 60), (by_tokens, "tokens", 1e6)):
            values = [row["held_out.bits_per_byte"] for row in tested]
            name = f"{NAMES[recipe]}: {values[-1]:.3f}"
            (line,) = axes.plot([places[row["step"]][key] / unit for row in tested], values, "o-", ms=3, label=name)
            smooth = [
                statistics.fmean(r["bits_per_byte"] for r in training[max(0, i - 9) : i + 1])
                for i in range(len(training))
            ]
            axes.plot([row[key] / unit for row in training], smooth, color=line.get_color(), lw=0.7, alpha=0.4)
    for axes, label in ((by_time, "minutes of training"), (by_tokens, "million bytes")):
        axes.set(xlabel=label, ylabel="bits per byte", ylim=(0.7, 2.5))
        axes.grid(alpha=0.3)
        axes.legend(title="sample of the held-out text (pale: training)", fontsize=8, title_fontsize=8)
    FIGURE.parent.mkdir(exist_ok=True)
    figure.savefig(FIGURE, dpi=120)
    print(FIGURE)


def main() -> None:
    """Make the corpus, or record what runs came to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["corpus", "report", "plot"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--root", type=Path, default=Path(sysconfig.get_path("purelib")), help="where packages are")
    parser.add_argument("--max-files", type=int, default=MAX_FILES)
    options = parser.parse_args()
    if options.part == "corpus":
        corpus(options.folder, options.root, options.max_files)
        return
    if options.part == "report":
        report("gpu_training", list(rows(options.folder)), PACKAGES)
    plot(options.folder)


if __name__ == "__main__":
    main()
