"""The demo from beginning to end: text, training, the held-out figure, report, and a completion from the disk."""

import shutil
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from statespan import checkpoints, generation
from statespan.demo.corpus import EXCLUSIONS, CompressedSizes, SourceSplit, compress, split_sources
from statespan.demo.curve import draw_curve, read_curve, seconds_to_reach
from statespan.demo.precision import faster_precision
from statespan.demo.recipe import demo_config
from statespan.demo.report import DemoResult, write_report, write_results
from statespan.errors import UserError
from statespan.machine import describe_machine
from statespan.models.accounting import count_parameters
from statespan.training import TrainingConfig, TrainingResult, train

SHOWN_BYTES = 400  # of the completion
TEMPERATURE, TOP_P = 0.7, 0.95


@dataclass(frozen=True)
class DemoOptions:
    """What the command line asks for."""

    output: Path = Path("demo-output")
    minutes: float = 5.0  # of training
    seed: int = 0  # of the split, the weights, the order and the completion
    precision: str = "auto"  # auto, float32 or bfloat16
    device: str = "cpu"
    prompt: str = "def "
    max_files: int | None = None  # of the standard library; None: all
    command: str = "statespan demo"  # as it was typed, for the report


def run_demo(options: DemoOptions) -> DemoResult:
    """Run the demo and leave corpus, run, checkpoint, picture, numbers and report in `options.output`.

    Raises:
        UserError: the prompt is empty; the output folder holds something else, or cannot be used.
        KeyboardInterrupt: after Ctrl-C in training; the run is saved first.
    """
    if not options.prompt:
        raise UserError("the prompt is empty; give at least one letter with --prompt")
    split = split_sources(options.seed, max_files=options.max_files)
    _prepare_folder(options.output)
    split.copy_to(options.output / "corpus")
    sizes = compress(split.held_out_bytes())
    print(f"text      {len(split.train)} files of {split.root}, {EXCLUSIONS};")
    print(f"          {len(split.held_out)} more are held out: {sizes.original:,} bytes")
    print(f"          gzip -9 makes {sizes.bits_per_byte(sizes.gzip):.3f} bits per byte of them, ", end="")
    print(f"xz -9 {sizes.bits_per_byte(sizes.xz):.3f}")
    config, precision = _choose_precision(options)
    print(f"training  {options.minutes:g} minutes on {options.device} in {precision}", flush=True)
    trained = _train(config, options.output)
    return _report(options, split, sizes, config, precision, trained)


def _prepare_folder(output: Path) -> None:
    """Refuse a folder with other things in it; of an earlier demo, the run is removed."""
    if output.exists() and not output.is_dir():
        raise UserError(f"{output} is a file; name a folder with --output")
    if output.exists() and any(output.iterdir()) and not (output / "corpus" / "held-out").is_dir():
        raise UserError(f"{output} holds other files than a demo's; name another folder with --output")
    shutil.rmtree(output / "run", ignore_errors=True)


def _choose_precision(options: DemoOptions) -> tuple[TrainingConfig, str]:
    """The config, and its arithmetic with the reason in words."""
    config = demo_config(options.output / "corpus", seed=options.seed, minutes=options.minutes)
    config = config.override([f"run.device={options.device}"])
    if options.precision != "auto":
        return config.override([f"run.precision={options.precision}"]), f"{options.precision} (as asked)"
    print("          timing a few steps to choose the arithmetic", flush=True)
    choice = faster_precision(config)
    return config.override([f"run.precision={choice.name}"]), str(choice)


def _train(config: TrainingConfig, output: Path) -> TrainingResult:
    result = train(config, output / "run")
    if result.interrupted_by is not None:
        raise KeyboardInterrupt
    checkpoints.convert(result.checkpoint, output / "checkpoint")
    return result


def _report(
    options: DemoOptions,
    split: SourceSplit,
    sizes: CompressedSizes,
    config: TrainingConfig,
    precision: str,
    trained: TrainingResult,
) -> DemoResult:
    """Write the picture, the numbers and the page, and show the verdict; the completion comes from the checkpoint."""
    output, held_out = options.output, trained.held_out
    assert held_out is not None  # the run had held-out text and was not interrupted
    points = read_curve(trained.run_directory)
    gzip_bits = sizes.bits_per_byte(sizes.gzip)
    missed = held_out.bits_per_byte >= gzip_bits
    count = count_parameters(config.model)
    result = DemoResult(
        command=options.command,
        finished=datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
        seed=options.seed,
        train_files=len(split.train),
        train_bytes=split.train_size(),
        held_out_files=len(split.held_out),
        sizes=sizes,
        bits_per_byte=held_out.bits_per_byte,
        evaluation_s=held_out.seconds,
        training_s=trained.seconds,
        steps=trained.step,
        trained_bytes=trained.num_tokens,
        seconds_to_beat_gzip=seconds_to_reach(gzip_bits, held_out.bits_per_byte, points) if missed else None,
        precision=precision,
        parameters=count.total,
        active_parameters=count.active,
        config=config.to_dict(),
        machine=describe_machine(options.device),
        prompt=options.prompt,
        completion=_complete(output / "checkpoint", options),
    )
    draw_curve(output / "curve.png", points, result.levels())
    write_results(output / "results.json", result)
    write_report(output / "report.html", result, output / "curve.png")
    print(f"\nresult    {result.verdict()}")
    print(f"report    {output / 'report.html'}")
    print(f"try       statespan generate {output / 'checkpoint'} 'import ' --temperature {TEMPERATURE}")
    return result


def _complete(checkpoint: Path, options: DemoOptions) -> str:
    """Load the checkpoint from the disk and stream what it writes after the prompt."""
    model = checkpoints.load(checkpoint, device=options.device)
    print(f"reloaded  {checkpoint}; it goes on:\n\n{options.prompt}", end="", flush=True)
    pieces: list[str] = []
    stream = generation.generate_stream(
        model, options.prompt, max_new_tokens=SHOWN_BYTES, temperature=TEMPERATURE, top_p=TOP_P, seed=options.seed
    )
    for event in stream:
        print(event.text, end="", flush=True)
        pieces.append(event.text)
    print()
    return "".join(pieces)
