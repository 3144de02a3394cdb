"""An inspection as files: pictures that show the values, a page that needs nothing else, one line for bad input."""

import itertools
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from matplotlib.image import imread

import statespan
from statespan.checkpoints.tokenizer import ByteTokenizer
from statespan.cli import main
from statespan.errors import UserError
from statespan.inspection import figures, inspect_text, layer_view, observe, token_view
from statespan.inspection.report import MOST_TOKENS, Inspection
from statespan.models.language_model import LanguageModel

HOSTILE = "</script><b onclick='x'>{{data}} $x_1$ & né\n\t\\"
TITLE = "</script><tiny>"
PICTURES = ["dt.png", "experts.png", "logprobs.png", "memory.png", *(f"layer_{i:03}.png" for i in range(6))]


@pytest.fixture(scope="module")
def written(model: LanguageModel, tmp_path_factory: pytest.TempPathFactory) -> tuple[Inspection, Path]:
    folder = tmp_path_factory.mktemp("inspection") / "new" / "folder"
    return inspect_text(model, HOSTILE, folder, title=TITLE), folder


class Page(HTMLParser):
    """What stands in a page's elements."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = [("", {})]
        self.texts: dict[str, str] = {}
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        tag, attributes = self.tags[-1]
        self.texts.setdefault(attributes.get("id") or tag, data)


def test_the_folder_holds_pictures_page_and_figures(written: tuple[Inspection, Path]) -> None:
    found, folder = written
    assert sorted(file.name for file in folder.iterdir()) == sorted([*PICTURES, "index.html", "inspection.json"])
    assert sorted(found.pictures) == sorted(PICTURES)
    for name in PICTURES:
        pixels = imread(folder / name)
        assert min(pixels.shape[:2]) > 150 and pixels[..., :3].std() > 0.05, name


def test_the_figures_are_those_of_the_model(model: LanguageModel, written: tuple[Inspection, Path]) -> None:
    data = json.loads((written[1] / "inspection.json").read_text())
    assert "".join(data["texts"]) == HOSTILE and data["ids"] == list(HOSTILE.encode())
    for layer in data["layers"]:
        view = token_view(model, data["ids"], layer["index"])
        assert layer["kind"] == str(model.config.layers[layer["index"]])
        assert layer["dt"] == (None if view.dt is None else pytest.approx(view.dt, rel=1e-3))
        assert layer["experts"] == (None if view.experts is None else [list(choices) for choices in view.experts])
        assert data["logprobs"] == [None, *(pytest.approx(value, rel=1e-3) for value in view.logprobs[1:])]
    assert data["bits_per_token"] == pytest.approx(-np.mean(data["logprobs"][1:]) / np.log(2), rel=1e-3)
    assert [layer["memory"] is not None for layer in data["layers"]] == [
        True,
        True,
        False,
        True,
        True,
        True,
        False,
        False,
    ]
    memory = layer_view(model, observe(model, data["ids"]), 0).memory
    assert memory is not None
    assert data["layers"][0]["memory"]["max"] == pytest.approx(float(memory.max()), rel=1e-3)


def test_the_page_needs_nothing_else_and_no_text_becomes_markup(written: tuple[Inspection, Path]) -> None:
    text = (written[1] / "index.html").read_text(encoding="utf-8")
    page = Page(text)
    assert json.loads(page.texts["data"]) == json.loads((written[1] / "inspection.json").read_text())
    assert page.texts["title"] == f"Inside {TITLE}"
    images = [attributes for tag, attributes in page.tags if tag == "img"]
    assert len(images) == len(PICTURES)
    assert all(a["alt"] and (a["src"] or "").startswith("data:image/png;base64,iVBOR") for a in images)
    assert not {tag for tag, _ in page.tags} & {"b", "link", "iframe"}
    assert not re.search(r"https?://|src=\"(?!data:)", text)


def test_the_page_colours_and_tells_in_a_browser(written: tuple[Inspection, Path]) -> None:
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no Chromium is installed")
    problems: list[str] = []
    with playwright.sync_playwright() as running:
        browser = running.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 390, "height": 800})
        page.on("console", lambda message: problems.append(message.text))
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("request", lambda request: problems.append(request.url) if request.url.startswith("http") else None)
        page.goto((written[1] / "index.html").as_uri())
        spans = page.locator("#text span")
        assert "".join(text for text in spans.all_text_contents() if text != "·") == HOSTILE
        assert page.locator("#layer").is_hidden()  # surprise is of no layer
        page.select_option("#by", "dt")
        assert page.locator("#layer option").all_text_contents() == ["0 mamba1+moe", "1 mamba2+mlp"]
        page.select_option("#layer", "1")
        colours = spans.evaluate_all("all => all.map(span => span.style.background)")
        dt = written[0].layers[1].dt
        assert dt is not None
        alphas = [float(colour.split(",")[3][:-1]) for colour in colours]
        assert np.argmax(alphas) == int(dt.argmax()) and np.argmin(alphas) == int(dt.argmin())
        page.focus("#text")
        for _ in range(3):
            page.keyboard.press("ArrowRight")
        told = page.text_content("#facts") or ""
        assert told.startswith('token 2: "s", id 115; ') and f"dt {float(dt[2]):.3g}" in told
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
        browser.close()
    assert problems == []


def test_a_picture_shows_the_values(model: LanguageModel, tmp_path: Path) -> None:
    """Where dt is largest the picture is brightest."""
    dt = torch.full((20,), 0.01)
    dt[13] = 1.0
    figures.draw_dt(tmp_path / "dt.png", {0: dt, 3: dt.flip(0)}, ["x"] * 20)
    pixels = imread(tmp_path / "dt.png")[..., :3]
    yellow = np.argwhere((np.abs(pixels - [0.993, 0.906, 0.144]) < 0.02).all(-1))
    places = (yellow[:, 1][yellow[:, 1] < 0.85 * pixels.shape[1]]).astype(float)
    rows = yellow[:, 0][yellow[:, 1] < 0.85 * pixels.shape[1]]
    upper, lower = places[rows < rows.mean()].mean(), places[rows > rows.mean()].mean()
    assert upper > lower + 100  # token 13 of layer 0, token 6 of layer 3


def test_panels_do_not_cover_each_other(model: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Figure] = []
    make = figures._figure
    monkeypatch.setattr(figures, "_figure", lambda *size: drawn.append(make(*size)) or drawn[-1])
    inspect_text(model, "some text", tmp_path, layers=range(len(model.layers)))
    assert max(len(figure.axes) for figure in drawn) > 4
    for figure in drawn:
        boxes = [axes.get_tightbbox() for axes in figure.axes]
        for first, second in itertools.combinations(boxes, 2):
            assert not first.padded(-2).overlaps(second.padded(-2))


def test_a_new_inspection_replaces_the_old_one_and_nothing_else(model: LanguageModel, tmp_path: Path) -> None:
    inspect_text(model, "one", tmp_path, layers=[0, 2, 6])
    (tmp_path / "mine.png").write_bytes(b"mine")
    assert (tmp_path / "layer_002.png").exists() and not (tmp_path / "layer_006.png").exists()
    inspect_text(model, [65, 66], tmp_path, layers=[4])
    names = {file.name for file in tmp_path.iterdir()}
    assert names == {"layer_004.png", "memory.png", "logprobs.png", "index.html", "inspection.json", "mine.png"}


def test_an_inspection_that_fails_leaves_the_old_one(
    model: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inspect_text(model, "one", tmp_path, layers=[0])
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}

    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("statespan.inspection.report.write_page", full)
    with pytest.raises(UserError, match=r"^.*: the inspection cannot be written there: No space left on device; name"):
        inspect_text(model, "two", tmp_path, layers=[0, 2])
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_one_token_and_ids_without_a_tokenizer(model: LanguageModel, tmp_path: Path) -> None:
    tokenizer, model.tokenizer = model.tokenizer, None
    try:
        found = inspect_text(model, [7], tmp_path, layers=[0, 2, 3])
        with pytest.raises(UserError, match="the model has no tokenizer"):
            inspect_text(model, "x", tmp_path)
    finally:
        model.tokenizer = tokenizer
    assert found.texts == ("<7>",) and found.summary() == "1 token"
    assert not (tmp_path / "logprobs.png").exists()  # nothing comes before the first token
    assert json.loads((tmp_path / "inspection.json").read_text())["bits_per_token"] is None


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ("", {}, "the text is empty; give at least one token"),
        ([], {}, "the text is empty"),
        ("x" * (MOST_TOKENS + 1), {}, "the text has 1025 tokens and an inspection takes at most 1024; give a part"),
        ("x", {"layers": [0, 8]}, "the model has no layer 8; its layers are 0 to 7"),
        ("x", {"num_channels": 0}, "num_channels must be at least 1, got 0"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(
    model: LanguageModel, text: str, options: dict[str, object], message: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError) as error:
        inspect_text(model, text, tmp_path / "out", **options)  # type: ignore[arg-type]
    assert str(error.value).startswith(message) and "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_written_is_told_before_the_work(
    model: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("statespan.inspection.report.observe", lambda *arguments: pytest.fail("worked first"))
    (tmp_path / "file").write_text("in the way")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(UserError, match=r"the inspection cannot be written there: .*; name another folder"):
            inspect_text(model, "x", folder)


# The command


@pytest.fixture(scope="module")
def checkpoint(model: LanguageModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    model.save(folder)
    return folder


def test_the_command_draws_and_prints(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["inspect", str(checkpoint), "--text", "def f(x):", "--layers", "0,2-3", "--channels", "3"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines[2:5]] == [["0", "mamba1+moe"], ["2", "attention+moe"], ["3", "s4"]]
    assert lines[5].startswith("9 tokens, ") and lines[5].endswith(" bits a token")
    assert lines[6] == f"7 pictures and the page: {Path('inspection-output/index.html')}"
    data = json.loads((tmp_path / "inspection-output" / "inspection.json").read_text())
    assert data["title"] == str(checkpoint) and "".join(data["texts"]) == "def f(x):"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--text", ""], "the text is empty; give at least one token"),
        (["--text", "x", "--layers", "8"], "the model has no layer 8; its layers are 0 to 7"),
        (["--text", "x", "--layers", "1,b"], "'b' is no layer; write layers, such as 0,4-6"),
        (["--text", "x", "--layers", "6-4"], "'6-4' is no layer"),
        (["--text", "x", "--layers", "0-99999999999"], "'0-99999999999' is no layer"),
        (["--text", "x", "--channels", "0"], "must be at least 1, got 0"),
        (["--text", "x", "--context", "4K"], "--context does not go with --text"),
        (["--text", "x", "--device", "gpu"], "'gpu' is no device"),
        (["--layers", "1"], "--layers goes with --text; see statespan inspect --help"),
        (["--output", "folder"], "--output goes with --text"),
    ],
)
def test_the_command_refuses(
    checkpoint: Path, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["inspect", str(checkpoint), *words]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_a_quantized_model_is_seen_as_it_is(checkpoint: Path, tmp_path: Path) -> None:
    words = ["inspect", str(checkpoint), "--text", "def f(x):", "--layers", "6", "--output"]
    found: list[list[float]] = []
    for options in ([], ["--quantize", "int8"]):
        assert main([*words, str(tmp_path), *options]) == 0
        found.append(json.loads((tmp_path / "inspection.json").read_text())["logprobs"])
    model = statespan.load(checkpoint, quantize="int8")
    ids = list(b"def f(x):")
    with torch.no_grad():
        logprobs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    assert found[1][1:] == pytest.approx([float(logprobs[t - 1, ids[t]]) for t in range(1, 9)], rel=1e-3)
    assert found[0][1:] != pytest.approx(found[1][1:], rel=1e-3)


def test_a_text_needs_weights(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", "jamba-tiny", "--text", "x"]) == 2
    assert "is a preset, which has no weights" in capsys.readouterr().err
    assert main(["inspect", "--text", "x"]) == 2
    assert "--text needs MODEL" in capsys.readouterr().err


def test_byte_texts_of_any_input_are_written(model: LanguageModel, tmp_path: Path) -> None:
    """Bytes that are no UTF-8 reach the page as replacement characters."""
    found = inspect_text(model, ByteTokenizer().encode("a\udcffb"), tmp_path, layers=[7])
    assert "".join(found.texts) == "a\ufffdb"
