"""Peak memory on the CPU against a budget: weights, what training adds, and the activations kept for the backward.

    python -m benchmarks.cpu_memory [scan prefill train decode jamba] [--repetitions 3] [--length 2048]

Each figure comes from a fresh process, which builds a tiny model of the same kind and runs it (so that libraries and
kernels are loaded), notes its resident size, builds the real one, makes one small call, resets its peak, and makes
the call in question. The figure is the peak beyond the size noted. Beside it stands the budget, counted from tensors;
inference keeps no activations, and its budget is what the same forward would keep with gradients.
"""

import argparse
import ctypes
import gc
import json
import resource
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

import statespan
from benchmarks.cpu_models import JAMBA, TYPES, hf_decode, in_inference, our_decode, training_step
from benchmarks.cpu_scan import ours as scan
from benchmarks.cpu_scan import random_inputs
from benchmarks.record import Row, report
from statespan.models.config import ModelConfig
from statespan.models.language_model import LanguageModel
from statespan.models.presets import preset

MIB, NEW_TOKENS, PROMPT = 2**20, 32, 16
CONFIGS = {"mamba-130m": preset("mamba-130m"), "jamba 102M": JAMBA}
TINY = {"hidden_size": 64, "vocab_size": 256}


@dataclass(frozen=True)
class Case:
    """One figure: what is run, of which model, by whom, in which numbers."""

    task: str  # "scan forward", "scan forward + backward", "prefill", "train" or "decode"
    model: str  # a name of CONFIGS, or "" for the scan alone
    system: str  # "statespan" or "transformers"
    numbers: str  # "float32", "bfloat16", "int8", "bfloat16 autocast"
    length: int  # tokens; of the prompt in decode

    def title(self) -> str:
        """The task with its shape."""
        size = f"{NEW_TOKENS} tokens" if self.task == "decode" else f"2 x {self.length}" if self.task == "train" else ""
        return f"{self.model} {self.task} {size or self.length}".strip()


@dataclass(frozen=True)
class Memory:
    """Bytes of one run."""

    peak: int  # beyond libraries and kernels
    held: int  # weights, gradients and optimizer; of the scan: inputs, outputs and their gradients
    kept: int  # activations for the backward, each storage once, and states
    all_states: int  # [b t d n] in float32, of one layer


@dataclass(frozen=True)
class Work:
    """Something to run at a length, and how to count its budget."""

    run: Callable[[int], object]  # takes the number of tokens
    held: Callable[[], int]  # bytes, after a run
    forward: Callable[[int], object]  # with gradients; returns what holds the graph
    parameters: Callable[[], Iterable[Tensor]]  # not counted among the activations
    channels: int  # d * n


def resident_bytes(field: str) -> int:
    """VmRSS, or VmHWM, the peak since it was reset; elsewhere than on Linux the peak of the process's whole life."""
    status = Path("/proc/self/status")
    if not status.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    line = next(line for line in status.read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def settle() -> None:
    """Give freed memory back to the system and begin a new peak."""
    gc.collect()
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")


def storage_bytes(tensors: Iterable[Tensor]) -> dict[int, int]:
    """Size of each storage by its address."""
    return {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}


def kept_bytes(forward: Callable[[], object], parameters: Iterable[Tensor]) -> int:
    """Bytes that autograd keeps after `forward`, each storage once, without the parameters."""
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        graph = forward()
    sizes, known = storage_bytes(kept), storage_bytes(parameters)
    del graph
    return sum(size for address, size in sizes.items() if address not in known)


def scan_work(backward: bool, tiny: bool) -> Work:
    """The selective scan alone, 1 x length x 1536, N = 16."""
    channels, states = (64, 16) if tiny else (1536, 16)
    inputs: dict[int, dict[str, Tensor]] = {}

    def run(length: int) -> object:
        x = inputs.setdefault(length, random_inputs(length, channels, states, torch.float32))
        with torch.set_grad_enabled(backward):
            y = scan(x)
        if backward:
            y.sum().backward()
        return y

    def held() -> int:
        x = inputs[max(inputs)]
        twice = 2 if backward else 1  # the gradients
        return twice * (sum(t.nbytes for t in x.values()) + x["u"].nbytes)

    def forward(length: int) -> object:
        return scan(inputs[length]) if backward else None

    return Work(run, held, forward, lambda: inputs[max(inputs)].values(), channels * states)


def prompt(length: int, rows: int = 1) -> Tensor:
    """Token ids that every model here has."""
    return torch.randint(0, 200, (rows, length))


def model_work(case: Case, tiny: bool) -> Work:
    """Our model."""
    config = CONFIGS[case.model].replace(**TINY if tiny else {})
    dtype = TYPES["bfloat16" if case.numbers in ("bfloat16", "int8") else "float32"]
    model = statespan.build(config, seed=0, dtype=dtype)
    if case.numbers == "int8":
        statespan.quantize(model)
    if case.task == "train":
        return training_work(model, case)

    def read(length: int) -> object:
        return model(prompt(length), state=model.new_state(1), logits_at="last")

    def run(length: int) -> object:
        if case.task == "decode":
            return our_decode(model, prompt(length), NEW_TOKENS)()
        return in_inference(lambda: read(length))()

    return Work(run, lambda: weight_bytes(model), read, model.state_dict().values, scan_size(config))


def training_work(model: LanguageModel, case: Case) -> Work:
    """Steps on two rows; the optimizer stays from call to call."""
    autocast = "autocast" in case.numbers
    ids = prompt(case.length, rows=2)

    def loss() -> Tensor:
        value = model(ids, labels=ids).loss
        assert value is not None
        return value

    step = training_step(model, loss, autocast)

    def run(length: int) -> object:
        nonlocal ids
        ids = prompt(length, rows=2)
        return step()

    def forward(length: int) -> object:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return loss()

    with_training = 4  # weights, gradients, and AdamW's two numbers a weight
    return Work(run, lambda: with_training * weight_bytes(model), forward, model.parameters, scan_size(model.config))


def weight_bytes(model: torch.nn.Module) -> int:
    """Bytes of the weights, tied ones once."""
    return sum(storage_bytes(model.state_dict().values()).values())


def scan_size(config: ModelConfig) -> int:
    """Channels times states of a Mamba-1 layer."""
    return config.mamba1.expand * config.hidden_size * config.mamba1.state_size


def peer_work(case: Case, folder: Path) -> Work:
    """The same weights in transformers; nothing is known of what it keeps."""
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=TYPES[case.numbers]).eval()

    def run(length: int) -> object:
        if case.task == "decode":
            return in_inference(hf_decode(model, prompt(length), NEW_TOKENS))()
        return in_inference(lambda: model(prompt(length), use_cache=True, logits_to_keep=1))()

    return Work(run, lambda: weight_bytes(model), lambda _: None, list[Tensor], scan_size(CONFIGS[case.model]))


def work_of(case: Case, folder: Path, *, tiny: bool) -> Work:
    """What the case runs."""
    if not case.model:
        return scan_work("backward" in case.task, tiny)
    if case.system == "transformers":
        return peer_work(case, folder / case.model / ("tiny" if tiny else "whole"))
    return model_work(case, tiny)


def measure(case: Case, folder: Path) -> Memory:
    """Run the case in this process."""
    work_of(case, folder, tiny=True).run(PROMPT)
    settle()
    before = resident_bytes("VmRSS")
    work = work_of(case, folder, tiny=False)
    work.run(PROMPT)
    settle()
    work.run(case.length)
    peak = resident_bytes("VmHWM") - before
    kept = kept_bytes(lambda: work.forward(case.length), work.parameters())
    rows = 2 if case.task == "train" else 1
    return Memory(peak, work.held(), kept, rows * case.length * work.channels * 4)


def in_fresh_process(case: Case, folder: Path) -> Memory:
    """`measure` in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.cpu_memory", "--case", json.dumps(asdict(case)), "--folder", folder]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{case}: {done.stderr.strip()}")
    return Memory(**json.loads(done.stdout.splitlines()[-1]))


def cases(part: str, length: int) -> list[Case]:
    """The figures of a part, peers after ours."""
    half = ("float32", "bfloat16")
    peers = ("statespan", "transformers") if find_spec("transformers") is not None else ("statespan",)

    def inference(task: str, model: str, tokens: int) -> list[Case]:
        found = [Case(task, model, system, numbers, tokens) for system in peers for numbers in half]
        return [*found, Case(task, model, "statespan", "int8", tokens)] if task == "decode" else found

    if part == "scan":
        return [Case(task, "", "statespan", "float32", length) for task in ("scan forward", "scan forward + backward")]
    if part == "train":
        kinds = ("float32", "bfloat16 autocast")
        return [Case("train", "mamba-130m", "statespan", numbers, min(512, length)) for numbers in kinds]
    if part == "jamba":
        return inference("prefill", "jamba 102M", length) + inference("decode", "jamba 102M", PROMPT)
    return inference(part, "mamba-130m", length if part == "prefill" else PROMPT)


def row(case: Case, found: list[Memory]) -> Row:
    """The median peak, with the budget in the note."""
    peak = statistics.median(memory.peak for memory in found)
    spread = (max(memory.peak for memory in found) - min(memory.peak for memory in found)) / peak
    held, kept, states = (value / MIB for value in (found[0].held, found[0].kept, found[0].all_states))
    note = f"weights {held:,.0f} MiB"
    if case.system == "statespan":
        what = {"train": "weights, gradients, AdamW"}.get(case.task, "weights" if case.model else "inputs, outputs")
        note = f"budget {held + kept:,.0f} MiB: {what} {held:,.0f}, kept for a backward {kept:,.0f}"
    if case.task != "decode":
        note += f"; [b t d n] of a layer {states:,.0f}"
    return Row(f"peak memory, {case.title()}", f"{case.system} {case.numbers}", peak / MIB, "MiB", spread, note)


def save_for_peers(names: Iterable[str], folder: Path) -> None:
    """The models as files that transformers loads."""
    for name in names:
        for size, changes in {"tiny": TINY, "whole": {}}.items():
            statespan.build(CONFIGS[name].replace(**changes), seed=0).save(folder / name / size, format="transformers")


def main() -> None:
    """Measure what is asked for and record it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", default=["scan", "prefill", "train", "decode", "jamba"])
    parser.add_argument("--repetitions", type=int, default=3, help="fresh processes a figure; peers: 1")
    parser.add_argument("--length", type=int, default=2048, help="tokens of a prompt")
    parser.add_argument("--case", help=argparse.SUPPRESS)  # what a fresh process is asked to do
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        print(json.dumps(asdict(measure(Case(**json.loads(options.case)), options.folder))))
        return
    with tempfile.TemporaryDirectory() as name:
        for part in options.parts:
            wanted, rows = cases(part, options.length), list[Row]()
            save_for_peers({case.model for case in wanted if case.system == "transformers"}, Path(name))
            for case in wanted:
                repetitions = options.repetitions if case.system == "statespan" else 1  # peers take minutes
                rows.append(row(case, [in_fresh_process(case, Path(name)) for _ in range(repetitions)]))
            report("cpu_memory", rows, ["statespan", "torch", "numba", "transformers"])


if __name__ == "__main__":
    main()
