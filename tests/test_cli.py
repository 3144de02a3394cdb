"""The command line: every command on tiny models, and one line without a traceback for what a user can do wrong."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import statespan
from statespan.cli import COMMANDS, main
from statespan.layers.config import AttentionConfig, Mamba1Config, MLPConfig, MoEConfig
from statespan.models.layer_pattern import LayerSpec

TINY = statespan.ModelConfig(
    hidden_size=16,
    layers=(LayerSpec("mamba1", "mlp"), LayerSpec("attention", "moe")),
    attention=AttentionConfig(num_heads=2),
    mlp=MLPConfig(24),
    moe=MoEConfig(num_experts=2, top_k=1, intermediate_size=24),
)
PROGRAM = [sys.executable, "-c", "import sys; from statespan.cli import main; sys.exit(main())"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    statespan.build(TINY, seed=1).save(folder)
    return folder


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """A folder of six small documents."""
    folder = tmp_path / "text"
    folder.mkdir()
    for index in range(6):
        (folder / f"{index}.txt").write_text(f"document {index} says {index * index}\n" * 20)
    return folder


def fails(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """Run a command that must fail as a user's mistake; returns its one line."""
    assert main(argv) == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1 and captured.err.startswith("statespan: "), captured.err
    assert "Traceback" not in captured.out
    return captured.err.removeprefix("statespan: ").rstrip("\n")


def works(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """Run a command that must succeed; returns what it printed on stdout."""
    code = main(argv)
    captured = capsys.readouterr()
    assert code == 0, captured.err
    return captured.out


def shell(*argv: str, **options: object) -> subprocess.CompletedProcess[str]:
    """Run the command in a process of its own."""
    return subprocess.run([*PROGRAM, *argv], capture_output=True, text=True, check=False, **options)  # type: ignore[call-overload]


# Help and names


def test_the_package_runs_as_a_program() -> None:
    run = subprocess.run([sys.executable, "-m", "statespan", "--version"], capture_output=True, text=True, check=False)
    assert (run.returncode, run.stdout) == (0, f"statespan {statespan.__version__}\n"), run.stderr


def test_without_a_command_the_commands_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    for words in ([], ["--help"], ["-h"]):
        out = works(capsys, *words)
        listed = [line.split()[0] for line in out.splitlines() if line.startswith("  ") and "statespan" not in line]
        assert listed == list(COMMANDS)
    assert works(capsys, "--version") == f"statespan {statespan.__version__}\n"


@pytest.mark.parametrize("name", COMMANDS)
def test_help_ends_in_an_example_that_names_the_command(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as leaving:
        main([name, "--help"])
    assert leaving.value.code == 0
    lines = capsys.readouterr().out.strip().splitlines()
    assert lines[-2] == "example:"
    assert lines[-1].startswith(f"  statespan {name}")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["trian"], "unknown command: 'trian'; did you mean 'train'?"),
        (["server"], "unknown command: 'server'; did you mean 'serve'?"),
        (["--verison"], "unknown option of statespan: '--verison'; did you mean '--version'?"),
        (["inspect", "jamba-tiny", "--contxt", "4K"], "unknown option of statespan inspect: '--contxt'; did you mean"),
        (["inspect", "--cont", "4K"], "did you mean '--context'?"),  # no abbreviations
        (["generate", "--temprature=1"], "did you mean '--temperature'?"),  # told before the missing arguments
        (["inspect", "jamba-tiny", "jamba-v0.1"], "unexpected argument 'jamba-v0.1'; see statespan inspect --help"),
        (["generate", "model"], "the following arguments are required: PROMPT"),
        (["generate", "model", "x", "--top-k", "many"], "argument --top-k: invalid int value: 'many'"),
        (["convert", "a", "b", "--format", "gguf"], "invalid choice: 'gguf'"),
        (["inspect", "jamba-tiny", "--context", "0"], "a context has at least 1 token, got 0"),
        (["inspect", "jamba-tiny", "--context", "4096,long"], "'long' is no length; write tokens, such as 4096,256K"),
        (["tune", "--op", "rms_nrom"], "unknown op that can be tuned: 'rms_nrom'; did you mean 'rms_norm'?"),
        (
            ["tune", "--device", "cpu"],
            "nothing to tune on cpu: the triton backend cannot run, it runs on NVIDIA and AMD",
        ),
        (["tune", "--device", "cuda:99"], "; tuning needs a GPU"),
        (["backends", "--device", "gpu"], "'gpu' is no device; write cpu, cuda, cuda:1 or mps"),
        (["lab", "--frobnicate"], "unknown option of statespan lab: '--frobnicate'; known: --dry-run, "),
        (["inspect", "folder/model"], "folder/model does not exist; give a preset's name or the folder of"),
        (["inspect", "folder/model"], "hf download folder/model --local-dir model"),
        (["demo", "--device", "gpu"], "'gpu' is no device; write cpu, cuda, cuda:1 or mps"),
        (["demo", "--device", "cuda:99"], "device 'cuda:99' cannot be used here"),
        (["demo", "--prompt", ""], "the prompt is empty; give at least one letter with --prompt"),
        (["demo", "--files", "1"], "1 file leaves nothing to train on, since one is held out; take at least 2"),
    ],
)
def test_unknown_words_are_refused(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert message in fails(capsys, *words)


# What ends a run


def test_interrupt_is_one_line_and_130(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupt(device: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("statespan.ops.dispatch.explain", interrupt)
    assert main(["backends"]) == 130
    assert capsys.readouterr().err == "\nstatespan: interrupted\n"


def test_a_reader_that_goes_away_is_no_error() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    run = subprocess.run([*PROGRAM, "inspect"], stdout=writing, stderr=subprocess.PIPE, check=False, env=buffered)
    os.close(writing)
    assert (run.returncode, run.stderr) == (141, b"")


# inspect and backends


def test_inspect_prints_the_memory_of_the_long_context(capsys: pytest.CaptureFixture[str]) -> None:
    for name, cache in (("jamba-v0.1", "4 GiB"), ("mixtral-8x7b", "32 GiB")):
        lines = works(capsys, "inspect", name, "--context", "256K").splitlines()
        row = next(line for line in lines if line.split()[:1] == ["256K"])
        assert cache in row


def test_inspect_reads_a_checkpoint(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    total = sum(p.numel() for p in statespan.build(TINY, device="meta").parameters())
    out = works(capsys, "inspect", str(checkpoint), "--context", "128")
    assert f"{total:,}" in out
    assert "mamba1+mlp" in out and "attention+moe" in out


def test_inspect_without_a_model_lists_the_presets(capsys: pytest.CaptureFixture[str]) -> None:
    out = works(capsys, "inspect")
    assert all(name in out for name in statespan.presets())


def test_inspect_offers_the_nearest_preset(capsys: pytest.CaptureFixture[str]) -> None:
    message = fails(capsys, "inspect", "jamba-v0.2")
    assert message == "unknown preset or checkpoint: 'jamba-v0.2'; did you mean 'jamba-v0.1'?"


def test_backends_names_each_op_once_as_running(capsys: pytest.CaptureFixture[str]) -> None:
    from statespan.ops.dispatch import OPS

    rows = [line.split() for line in works(capsys, "backends").splitlines()[2:]]
    assert sorted(row[0] for row in rows if row[2:] == ["runs"]) == sorted(OPS)


# generate


def test_generate_streams_what_the_python_call_returns(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = {"max_new_tokens": 24, "temperature": 0.9, "top_k": 40, "top_p": 0.95, "min_p": 0.01, "seed": 5}
    words = [word for name, value in options.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    out = works(capsys, "generate", str(checkpoint), "def f(", *words)
    assert out == statespan.generate(statespan.load(checkpoint), "def f(", **options).text + "\n"


def test_generate_reports_speed_on_stderr(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", str(checkpoint), "a", "--max-new-tokens", "8", "--seed", "0"]) == 0
    assert "8 tokens" in (error := capsys.readouterr().err)
    assert "tokens/s" in error


def test_generate_reads_stdin_and_stops(checkpoint: Path) -> None:
    model = statespan.load(checkpoint)
    whole = statespan.generate(model, "über", max_new_tokens=40, seed=3).text
    stop = whole[12:14]
    run = shell("generate", str(checkpoint), "-", "--max-new-tokens", "40", "--seed", "3", "--stop", stop, input="über")
    assert run.returncode == 0, run.stderr
    assert run.stdout == whole[: whole.index(stop)] + "\n"


def test_generate_refuses_stdin_that_is_not_utf8(checkpoint: Path) -> None:
    words = [*PROGRAM, "generate", str(checkpoint), "-"]
    run = subprocess.run(words, input=b"ab\xff", capture_output=True, check=False)
    assert run.returncode == 2
    assert run.stderr.decode() == "statespan: stdin: not UTF-8 at byte 2; give UTF-8 text\n"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--temperature", "-1"], "temperature must be finite and at least 0, got -1.0"),
        (["--top-p", "1.5"], "top_p must be above 0 and at most 1, got 1.5"),
        (["--max-new-tokens", "-3"], "max_new_tokens must be at least 0, got -3"),
        (["--device", "cuda:99"], "device 'cuda:99' cannot be used here"),
    ],
)
def test_generate_refuses_bad_options(
    words: list[str], message: str, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in fails(capsys, "generate", str(checkpoint), "x", *words)


@pytest.mark.skipif(torch.backends.mps.is_available(), reason="this machine has MPS")
def test_generate_says_that_there_is_no_mps(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = fails(capsys, "generate", str(checkpoint), "x", "--device", "mps")
    assert said == "device 'mps' cannot be used here: this machine or this PyTorch has no MPS; try cpu"


def test_generate_checks_its_options_before_it_loads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "top_k must be at least 1" in fails(capsys, "generate", str(tmp_path / "none"), "x", "--top-k", "0")


def test_generate_speculates_and_says_the_same(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("generate", str(checkpoint), "abcabcabc", "--max-new-tokens", "20", "--temperature", "0")
    plain = works(capsys, *words)
    assert works(capsys, *words, "--lookup") == plain
    assert works(capsys, *words, "--draft-model", str(checkpoint), "--num-drafts", "3") == plain
    assert "two drafters" in fails(capsys, *words, "--lookup", "--draft-model", str(checkpoint))
    assert "goes with --lookup" in fails(capsys, *words, "--num-drafts", "3")


def test_generate_and_inspect_quantised(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("generate", str(checkpoint), "a", "--max-new-tokens", "8", "--temperature", "0")
    model = statespan.load(checkpoint, quantize="experts_int8")
    text = statespan.generate(model, "a", max_new_tokens=8, temperature=0).text
    assert works(capsys, *words, "--quantize", "experts_int8") == text + "\n"
    assert "96.06 GiB in bfloat16, 54.1 GiB as experts_int8" in works(
        capsys, "inspect", "jamba-v0.1", "--quantize", "experts_int8"
    )
    assert "needs MODEL" in fails(capsys, "inspect", "--quantize", "int8")


def test_generate_says_that_a_preset_has_no_weights(capsys: pytest.CaptureFixture[str]) -> None:
    message = fails(capsys, "generate", "mamba-130m", "x")
    assert message == "'mamba-130m' is a preset, which has no weights; give the folder of a checkpoint"


# convert and damaged checkpoints


def test_convert_goes_there_and_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = statespan.build(TINY.replace(mamba1=Mamba1Config(inner_norms=True)), seed=2).eval()
    model.save(tmp_path / "ours")
    works(capsys, "convert", str(tmp_path / "ours"), str(tmp_path / "theirs"), "--format", "transformers")
    assert json.loads((tmp_path / "theirs" / "config.json").read_text())["model_type"] == "jamba"
    works(capsys, "convert", str(tmp_path / "theirs"), str(tmp_path / "back"))
    ids = torch.randint(256, (1, 9))
    torch.testing.assert_close(statespan.load(tmp_path / "back")(ids).logits, model(ids).logits, rtol=0, atol=0)


def test_convert_refuses_what_the_format_cannot_hold(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    message = fails(capsys, "convert", str(checkpoint), str(tmp_path / "target"), "--format", "transformers")
    assert "no norms on dt, B and C" in message
    assert not (tmp_path / "target").exists()


DAMAGES = {
    "missing weights": ("model.safetensors", None, "model.safetensors"),
    "empty weights": ("model.safetensors", lambda data: b"", "model.safetensors"),
    "truncated weights": ("model.safetensors", lambda data: data[: len(data) // 2], "model.safetensors"),
    "a flipped bit": (
        "model.safetensors",
        lambda data: data[:-9] + bytes([data[-9] ^ 4]) + data[-8:],
        "model.safetensors",
    ),
    "no config": ("config.json", None, "config.json"),
    "broken config": ("config.json", lambda data: data[:-5], "config.json"),
    "unknown key": (
        "config.json",
        lambda data: data.replace(b"hidden_size", b"hiden_size", 1),
        "did you mean 'hidden_size'?",
    ),
    "wrong shape": ("config.json", lambda data: data.replace(b'"hidden_size": 16', b'"hidden_size": 18'), "[256, 16]"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_named(
    damage: str, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name, change, message = DAMAGES[damage]
    folder = tmp_path / "damaged"
    shutil.copytree(checkpoint, folder)
    if change is None:
        (folder / name).unlink()
    else:
        before = (folder / name).read_bytes()
        (folder / name).write_bytes(change(before))
        assert (folder / name).read_bytes() != before
    assert message in fails(capsys, "generate", str(folder), "x")


# train

SMALL = [
    "model.hidden_size=16",
    'model.layers=["mamba1","attention+moe"]',
    "model.attention.num_heads=2",
    "model.moe.num_experts=2",
    "model.moe.intermediate_size=24",
    "data.sequence_length=32",
    "run.batch_size=2",
    "run.save_every=2",
]


def training(text: Path, run: Path, *words: str) -> list[str]:
    """The words of a training run of seconds."""
    return ["train", "mambabyte_tiny_cpu", f"data.train={text}", *SMALL, "--run", str(run), "run.max_steps=2", *words]


def test_train_resume_and_generate(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    out = works(capsys, *training(text, run))
    assert "step-000002: 2 steps" in out
    assert "bits per byte" in out
    assert "holds a run up to step-000002; resume it" in fails(capsys, *training(text, run))
    assert "step-000003: 3 steps" in works(capsys, *training(text, run, "--resume", "run.max_steps=3"))
    newest = statespan.load(run / "checkpoints" / "step-000003")
    expected = statespan.generate(newest, "a", max_new_tokens=5, seed=1).text + "\n"
    assert works(capsys, "generate", str(run), "a", "--max-new-tokens", "5", "--seed", "1") == expected


def test_train_without_a_recipe_lists_them_and_dry_run_prints_keys(capsys: pytest.CaptureFixture[str]) -> None:
    from statespan.recipes import load_recipe, recipes

    assert all(name in works(capsys, "train") for name in recipes())
    keys = works(capsys, "train", "jamba_small_cpu", "run.max_steps=7", "--dry-run", "model.mamba1.state_size=8")
    assert "run.max_steps=7\n" in keys and "model.mamba1.state_size=8\n" in keys
    # What is printed is what can be typed.
    changed = load_recipe("jamba_small_cpu").override(["run.max_steps=7", "model.mamba1.state_size=8"])
    typed = [line for line in keys.splitlines() if not line.endswith("=Infinity]")]
    assert load_recipe("jamba_small_cpu").override(typed) == changed


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["data.train=no/such/file.txt"], "no/such/file.txt: no such file or folder"),
        (["data.trian=x"], "unknown key in TrainingConfig.data: 'trian'; did you mean 'train'?"),
        (["run.max_step=3"], "unknown key in TrainingConfig.run: 'max_step'; did you mean 'max_steps'?"),
        (["run.max_steps=many"], "run.max_steps"),
        (["run.max_steps=0"], "run.max_steps must be at least 1, got 0"),
        (["run.max_steps"], "'run.max_steps': expected key=value"),
        (["data.sequence_length=100000"], "less than one row of data.sequence_length=100000"),
        (["--resume"], "has no checkpoint to resume from"),
        (["--max-steps", "3"], "unknown option of statespan train: '--max-steps'"),
        (["run.device=cuda:99"], "device 'cuda:99' cannot be used here"),
    ],
)
def test_train_refuses(
    words: list[str], message: str, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in fails(capsys, *training(text, tmp_path / "run", *words))


def test_train_refuses_an_unknown_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    assert "did you mean 'mambabyte_tiny_cpu'?" in fails(capsys, "train", "mambabyte_tiny")


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("empty.txt", b"", "empty.txt: the file is empty"),
        ("latin.txt", b"caf\xe9 " * 99, "latin.txt: not UTF-8 at byte 3 (0xe9)"),
        ("short.txt", b"too short", "the training text has 8 tokens, less than one row"),
        ("rows.jsonl", b'{"text": "fine"}\n{"text": \n', "rows.jsonl: line 2 is not JSON"),
        ("rows.jsonl", b'{"body": "fine"}\n', "has no field 'text'"),
    ],
)
def test_train_refuses_bad_text(
    name: str, data: bytes, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / name).write_bytes(data)
    assert message in fails(capsys, *training(tmp_path / name, tmp_path / "run"))


def test_a_full_disk_loses_nothing(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    works(capsys, *training(text, run))
    saved = run / "checkpoints" / "step-000002"
    limit = (saved / "model.safetensors").stat().st_size // 2
    program = (
        "import resource, sys; from statespan.cli import main\n"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))\n"
        "sys.exit(main())"
    )
    words = training(text, run, "--resume", "run.max_steps=4")
    failed = subprocess.run([sys.executable, "-c", program, *words], capture_output=True, text=True, check=False)
    assert failed.returncode == 2, failed.stderr
    last = failed.stderr.strip().splitlines()[-1]
    assert last.startswith("statespan: cannot save step-000004") and "step-000002 is untouched" in last
    assert "Traceback" not in failed.stderr
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-000002"]
    assert statespan.load(saved).config.hidden_size == 16


DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


@pytest.mark.parametrize("device", DEVICES)
def test_without_memory_a_line_says_what_to_do(
    device: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(words: tuple[str, ...]) -> None:
        torch.empty(1 << 50, dtype=torch.uint8, device=device)

    monkeypatch.setattr("statespan.cli.dispatch", run)
    place, asked = ("the computer", "1125899906842624 bytes") if device == "cpu" else ("the GPU", "1048576.00 GiB")
    start = f"{place} is out of memory (it asked for {asked} more); "
    for command, advice in {"train": "run.accumulation_steps=2", "serve": "--cache-bytes", "demo": "smaller"}.items():
        said = fails(capsys, command)
        assert said.startswith(start) and advice in said


def test_a_size_that_no_memory_holds(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def run(words: tuple[str, ...]) -> None:
        torch.empty(1 << 32, 1 << 32, device="meta")

    monkeypatch.setattr("statespan.cli.dispatch", run)
    assert "the computer is out of memory; " in fails(capsys, "generate")


def test_other_faults_keep_their_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(words: tuple[str, ...]) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr("statespan.cli.dispatch", run)
    with pytest.raises(RuntimeError, match="illegal"):
        main(["train"])


# What a user can do wrong in Python: the same one line


def _mask_of_another_length() -> None:
    ids = torch.zeros(1, 4, dtype=torch.int64)
    statespan.build(TINY)(ids, attention_mask=torch.ones(1, 5))


def _state_of_another_model() -> None:
    other = statespan.build(TINY.replace(hidden_size=32))
    statespan.build(TINY)(torch.zeros(1, 4, dtype=torch.int64), state=other.new_state(1))


def _backend_that_cannot_run() -> None:
    x = torch.zeros(1, 4, 8, dtype=torch.float64)
    statespan.ops.causal_conv1d(x, torch.zeros(8, 4, dtype=torch.float64), backend="cpu")


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        (lambda: statespan.build("mamba-13m"), "did you mean 'mamba-130m'?"),
        (lambda: statespan.load("no-such-folder"), "no-such-folder does not exist"),
        (lambda: statespan.build(TINY)(torch.tensor([[3, 256]])), "token id 256 is out of range"),
        (lambda: statespan.generate(statespan.build(TINY), [1, -1]), "token id -1"),
        (_mask_of_another_length, "[1, 5]"),
        (_state_of_another_model, "comes from another model"),
        (_backend_that_cannot_run, "backend 'cpu' of causal_conv1d cannot run here"),
        (lambda: statespan.generate(statespan.build(TINY), [1], max_tokens=3), "did you mean 'max_new_tokens'?"),
        (lambda: statespan.ModelConfig.from_dict({"hiden_size": 3}), "did you mean 'hidden_size'?"),
    ],
)
def test_mistakes_in_python_are_one_line_too(mistake: Callable[[], object], message: str) -> None:
    with pytest.raises(statespan.UserError) as error:
        mistake()
    assert message in str(error.value)
    assert "\n" not in str(error.value)
