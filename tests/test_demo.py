"""The demo's parts by value, and the whole demo in seconds."""

import base64
import gzip
import inspect
import json
import lzma
import math
import os
import shlex
import signal
import sysconfig
import threading
from pathlib import Path

import pytest
import torch

import statespan
from statespan.cli import main
from statespan.demo.corpus import CompressedSizes, compress, split_sources
from statespan.demo.curve import CurvePoint, Level, draw_curve, seconds_to_reach
from statespan.demo.report import DemoResult, write_report
from statespan.errors import DataError
from statespan.training.documents import python_sources


def write(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


@pytest.fixture
def library(tmp_path: Path) -> Path:
    """A small standard library with everything that has to be left out."""
    root = tmp_path / "lib"
    for index in range(40):
        write(root / f"pack{index % 4}" / f"module{index}.py", f"def f{index}():\r\n    return {index}\n".encode() * 9)
    write(root / "empty.py", b"")
    write(root / "latin.py", "# é\n".encode("latin-1"))
    write(root / "notes.txt", b"no source\n")
    for folder in ("test", "site-packages", "encodings", "pydoc_data", "pack0/tests", "pack1/idle_test"):
        write(root / folder / "left_out.py", b"x = 1\n")
    return root


def test_source_files_leaves_out_what_it_says(library: Path) -> None:
    names = [file.as_posix() for file in python_sources(library)]
    assert names == sorted(names, key=lambda name: Path(name))
    assert sorted(names) == sorted(f"pack{i % 4}/module{i}.py" for i in range(40))


def test_split_is_by_file_seeded_and_complete(library: Path) -> None:
    split, same, other = split_sources(3, library), split_sources(3, library), split_sources(4, library)
    assert split == same
    assert split.held_out != other.held_out
    assert len(split.held_out) == 2  # 5% of 40
    assert not set(split.train) & set(split.held_out)
    assert set(split.train) | set(split.held_out) == set(python_sources(library))


def test_copies_are_exact_and_replace_what_was_there(library: Path, tmp_path: Path) -> None:
    split = split_sources(0, library)
    write(tmp_path / "corpus" / "train" / "old.py", b"old = 1\n")
    split.copy_to(tmp_path / "corpus")
    for name, files in (("train", split.train), ("held-out", split.held_out)):
        found = {p.relative_to(tmp_path / "corpus" / name) for p in (tmp_path / "corpus" / name).rglob("*.py")}
        assert found == set(files)
        for file in files:
            assert (tmp_path / "corpus" / name / file).read_bytes() == (library / file).read_bytes()


def test_a_library_without_sources_is_told_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"0 Python source files; run the demo with a Python that has its sources"):
        split_sources(0, tmp_path)


def test_compressed_sizes_unpack_to_the_text() -> None:
    text = Path(inspect.__file__).read_bytes()
    sizes = compress(text)
    assert sizes.original == len(text)
    assert sizes.gzip == len(gzip.compress(text, compresslevel=9)) < len(gzip.compress(text, compresslevel=6))
    assert sizes.xz == len(lzma.compress(text, preset=9))
    assert sizes.bits_per_byte(sizes.gzip) == pytest.approx(8 * sizes.gzip / len(text))


def power_law(seconds: float) -> float:
    return 6.0 * seconds**-0.25


def test_seconds_to_reach_follows_a_power_law() -> None:
    points = [CurvePoint(float(s), power_law(s)) for s in range(10, 301, 10)]
    target = power_law(1200)
    assert seconds_to_reach(target, power_law(300), points) == pytest.approx(1200, rel=1e-6)
    # A held-out figure above the curve has the same ratio to go.
    assert seconds_to_reach(target, 1.1 * power_law(300), points) == pytest.approx(1200 * 1.1**4, rel=1e-6)


def test_seconds_to_reach_makes_no_wild_guess() -> None:
    flat = [CurvePoint(float(s), 3.0 + 0.001 * s) for s in range(10, 301, 10)]
    assert seconds_to_reach(2.0, 3.0, flat) is None
    slow = [CurvePoint(float(s), 3.0 * s**-0.01) for s in range(10, 301, 10)]
    assert seconds_to_reach(1.0, 3.0, slow) is None
    assert seconds_to_reach(2.0, 3.0, slow[:3]) is None
    assert seconds_to_reach(2.0, 3.0, []) is None


def test_curve_picture_shows_curve_and_levels(tmp_path: Path) -> None:
    from matplotlib.image import imread

    points = [CurvePoint(float(s), power_law(s)) for s in range(1, 301)]
    levels = [Level("gzip -9", 2.1, "#d1242f"), Level("xz -9", 1.8, "#9a6700")]
    draw_curve(tmp_path / "curve.png", points, levels)
    picture = imread(tmp_path / "curve.png")
    assert picture.shape[0] >= 600 and picture.shape[1] >= 1000
    for red, green, blue in ((0x1F, 0x6F, 0xEB), (0xD1, 0x24, 0x2F), (0x9A, 0x67, 0x00)):
        near = (abs(picture[..., :3] * 255 - [red, green, blue]) < 12).all(axis=-1)
        assert near.sum() > 500, (red, green, blue)  # pixels of that line and of its legend


def result_with(bits: float, seconds: float | None = None, completion: str = "x") -> DemoResult:
    return DemoResult(
        command="statespan demo",
        finished="2026-01-01 00:00",
        seed=0,
        train_files=20,
        train_bytes=1000,
        held_out_files=2,
        sizes=CompressedSizes(original=8000, gzip=2000, xz=1500),
        bits_per_byte=bits,
        evaluation_s=2.0,
        training_s=300.0,
        steps=10,
        trained_bytes=5000,
        seconds_to_beat_gzip=seconds,
        precision="float32",
        parameters=123456,
        active_parameters=65432,
        config={"model": {"hidden_size": 8}, "run": {"max_seconds": 300.0}},
        machine={"processor": "a <fast> one"},
        prompt="def ",
        completion=completion,
    )


@pytest.mark.parametrize(
    ("result", "ending"),
    [
        (result_with(1.2), "the model beats both, and is 40% smaller than gzip."),
        (result_with(1.6), "the model beats gzip, and is 20% smaller than gzip."),
        (
            result_with(2.5, 900.0),
            "misses gzip by 0.500 bits per byte. The curve, carried on, meets gzip after about 15.0 minutes.",
        ),
        (
            result_with(2.5),
            "misses gzip by 0.500 bits per byte. Its curve is too short or flat to say what time would close it.",
        ),
        (
            result_with(2.0),
            "misses gzip by 0.000 bits per byte. Its curve is too short or flat to say what time would close it.",
        ),
    ],
)
def test_the_verdict_says_what_the_figures_say(result: DemoResult, ending: str) -> None:
    assert result.verdict().startswith(
        f"{result.bits_per_byte:.3f} bits per byte on held-out files; gzip -9 needs 2.000"
    )
    assert "xz -9 1.500" in result.verdict()
    assert result.verdict().endswith(ending)


def test_the_page_escapes_what_the_model_wrote(tmp_path: Path) -> None:
    (tmp_path / "curve.png").write_bytes(b"picture")
    write_report(
        tmp_path / "report.html",
        result_with(1.2, completion="<script>alert(1)</script> & so on"),
        tmp_path / "curve.png",
    )
    page = (tmp_path / "report.html").read_text()
    assert "<script>" not in page and "&lt;script&gt;alert(1)&lt;/script&gt; &amp; so on" in page
    assert "a &lt;fast&gt; one" in page
    assert "model.hidden_size = 8\nrun.max_seconds = 300.0" in page
    assert base64.b64encode(b"picture").decode() in page
    assert '<td>this model</td><td class="number">1,200</td><td class="number">1.200</td>' in page
    assert '<td>gzip -9</td><td class="number">2,000</td><td class="number">2.000</td>' in page


# The whole demo


@pytest.fixture
def small_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The small files of the real standard library, in the place of the whole."""
    real, root = Path(sysconfig.get_path("stdlib")), tmp_path / "lib"
    small = [file for file in python_sources(real) if (real / file).stat().st_size < 6000][:40]
    for file in small:
        write(root / file, (real / file).read_bytes())
    others = sysconfig.get_path
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(root) if name == "stdlib" else others(name))
    return root


def bits_by_hand(checkpoint: Path, files: list[Path]) -> float:
    """Bits per byte: each file in one forward, without state; nothing predicts a first byte, so it costs 8 bits."""
    model = statespan.load(checkpoint)
    bits, size = 0.0, 0
    for file in files:
        ids = torch.tensor([list(file.read_bytes())])
        with torch.no_grad():
            logits = model(ids).logits
        chosen = logits[0, :-1].double().log_softmax(-1).gather(1, ids[0, 1:, None])
        bits += 8 - chosen.sum().item() / math.log(2)
        size += ids.shape[1]
    return bits / size


def test_demo_from_the_command_line(small_library: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "out"
    words = ["demo", "--output", str(output), "--minutes", "0.04", "--precision", "float32", "--seed", "1"]
    words += ["--device", "cpu:0"]
    code = main(words)
    captured = capsys.readouterr()
    assert code == 0, captured.err
    result = json.loads((output / "results.json").read_text())

    held_out = sorted((output / "corpus" / "held-out").rglob("*.py"))
    text = b"".join(file.read_bytes() for file in held_out)
    assert len(held_out) == result["held_out_files"] == 2
    assert result["sizes"] == {
        "original": len(text),
        "gzip": len(gzip.compress(text, compresslevel=9)),
        "xz": len(lzma.compress(text, preset=9)),
    }
    assert result["gzip_bits_per_byte"] == 8 * result["sizes"]["gzip"] / len(text)
    assert result["bits_per_byte"] == pytest.approx(bits_by_hand(output / "checkpoint", held_out), rel=1e-4)
    assert result["steps"] >= 1 and result["training_s"] >= 0.04 * 60

    # The sample is what the checkpoint on the disk says, and it was streamed.
    sample = statespan.generate(
        statespan.load(output / "checkpoint"), "def ", max_new_tokens=400, temperature=0.7, top_p=0.95, seed=1
    )
    assert result["completion"] == sample.text
    assert "def " + sample.text in captured.out

    assert result["config"]["run"]["device"] == "cpu:0" and "on cpu:0 in float32 (as asked)" in captured.out
    assert result["command"] == shlex.join(["statespan", *words])

    # One self-contained page with the picture and the figures.
    page = (output / "report.html").read_text()
    assert base64.b64encode((output / "curve.png").read_bytes()).decode() in page
    assert "http" not in page.replace("https://", "http://").partition("<pre>")[0]
    for figure in (result["bits_per_byte"], result["gzip_bits_per_byte"], result["xz_bits_per_byte"]):
        assert f"{figure:.3f}" in page
    assert f"{8 * result['sizes']['gzip'] / len(text):.3f}" in captured.out
    assert 20_000 < (output / "curve.png").stat().st_size < 1_000_000
    missed = result["bits_per_byte"] >= result["gzip_bits_per_byte"]
    assert ("misses gzip by" in page) == missed


def test_demo_keeps_out_of_other_folders(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "mine" / "thesis.txt", b"precious")
    assert main(["demo", "--output", str(tmp_path / "mine")]) == 2
    assert "holds other files than a demo's; name another folder with --output" in capsys.readouterr().err
    assert main(["demo", "--output", str(tmp_path / "mine" / "thesis.txt")]) == 2
    assert main(["demo", "--output", str(tmp_path / "mine" / "thesis.txt" / "inside")]) == 2
    assert "thesis.txt" in capsys.readouterr().err
    assert (tmp_path / "mine" / "thesis.txt").read_bytes() == b"precious"
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.txt"]


def test_ctrl_c_saves_and_leaves_with_130(
    small_library: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, ended = tmp_path / "out" / "run", threading.Event()

    def interrupt_once_training() -> None:
        while not (run / "metrics.jsonl").exists():
            if ended.wait(0.05):
                return
        if not ended.wait(0.3):
            os.kill(os.getpid(), signal.SIGINT)

    watcher = threading.Thread(target=interrupt_once_training, daemon=True)
    watcher.start()
    try:
        code = main(["demo", "--output", str(tmp_path / "out"), "--minutes", "2", "--precision", "float32"])
    finally:
        ended.set()
        watcher.join()
    assert code == 130
    assert "interrupted" in capsys.readouterr().err
    assert len(list((run / "checkpoints").glob("step-*/model.safetensors"))) == 1
    assert not (tmp_path / "out" / "report.html").exists()
