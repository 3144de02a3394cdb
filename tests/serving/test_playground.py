"""The playground in a real headless Chromium, against the real server on a tiny model."""

import json
import math
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn

import statespan
from statespan.checkpoints.tokenizer import ByteTokenizer
from statespan.inspection import token_view
from statespan.layers.config import AttentionConfig, Mamba1Config, Mamba2Config, MLPConfig, MoEConfig
from statespan.models.accounting import kv_bytes, kv_bytes_per_token, state_bytes, transformer_like
from statespan.models.layer_pattern import LayerSpec
from statespan.models.presets import preset
from statespan.serving.api.app import create_app
from statespan.serving.api.options import ServerOptions
from statespan.serving.api.playground import MOST_TOKENS
from statespan.serving.api.service import Service
from statespan.serving.backend import LocalBackend
from statespan.serving.chat_template import PLAIN, ChatTemplate
from statespan.serving.options import EngineOptions

get, post = partial(httpx.get, timeout=120), partial(httpx.post, timeout=120)  # the machine may be busy
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
ALPHA_STEP = 1 / 255 + 5e-4  # browsers cut alpha to 8 bits, and the page writes three digits
PLAYGROUND = Path(statespan.__file__).parent / "serving" / "playground"
CONFIG = statespan.ModelConfig(
    hidden_size=32,
    layers=tuple(map(LayerSpec.from_text, ("mamba1+moe", "attention+mlp", "mamba2+moe", "lstm"))),
    mamba1=Mamba1Config(state_size=4),
    mamba2=Mamba2Config(state_size=8, head_dim=16),
    attention=AttentionConfig(num_heads=4, num_kv_heads=2),
    mlp=MLPConfig(32),
    moe=MoEConfig(num_experts=4, top_k=2, intermediate_size=16),
)


class LiveServer:
    """The server on a thread of its own."""

    def __init__(self, options: ServerOptions = ServerOptions(), *, chat: bool = True) -> None:
        self.model = statespan.build(CONFIG, seed=5).eval()
        self.model.tokenizer = ByteTokenizer()
        backend = LocalBackend(self.model, EngineOptions(num_pages=512, max_rows=4))
        service = Service(
            backend,
            config=CONFIG,
            tokenizer=self.model.tokenizer,
            template=ChatTemplate(PLAIN) if chat else None,
            model=self.model,
            options=options,
        )
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.socket.getsockname()[1]}"
        self.server = uvicorn.Server(uvicorn.Config(create_app(service), log_config=None, timeout_graceful_shutdown=1))
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [self.socket]}, daemon=True)
        self.thread.start()
        until(lambda: self.server.started)

    def stop(self, *, at_once: bool = False) -> None:
        self.server.should_exit, self.server.force_exit = True, at_once
        self.thread.join(120)
        self.socket.close()


def until(condition: Callable[[], Any], seconds: float = 120) -> Any:
    """The condition's value once it is true."""
    end = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < end, "nothing came"
        time.sleep(0.02)
    return value


@pytest.fixture(scope="module")
def live() -> Iterator[LiveServer]:
    server = LiveServer()
    yield server
    server.stop()


# The endpoints


def test_model_facts_are_those_of_the_accounting(live: LiveServer) -> None:
    facts = get(f"{live.url}/playground/model").json()
    assert facts["state_bytes"] == state_bytes(CONFIG, 4)
    assert facts["kv_bytes_per_token"] == kv_bytes_per_token(CONFIG, 4) == 2 * 2 * 8 * 4
    assert facts["transformer_bytes_per_token"] == 4 * 2 * 2 * 8 * 4  # 7 sub-layers are 4 blocks with these heads
    assert [(layer["dt"], layer["experts"]) for layer in facts["layers"]] == [
        (True, True),
        (False, False),
        (True, True),
        (False, False),
    ]
    assert (facts["chat"], facts["num_experts"], facts["window"]) == (True, 4, None)


@pytest.mark.parametrize(
    ("name", "gib"), [("jamba-v0.1", 32), ("mixtral-8x7b", 32), ("mamba-130m", 9), ("transformer-130m", 9)]
)
def test_a_transformer_of_the_same_size(name: str, gib: float) -> None:
    """Jamba's partner is Mixtral, as in its paper; Mamba's has half as many blocks, as in its own."""
    assert kv_bytes(transformer_like(preset(name)), 256 * 1024) / 2**30 == gib


def test_token_views_are_those_of_the_model(live: LiveServer) -> None:
    ids = [*"né ".encode(), 0xC3]
    for layer in range(4):
        reply = post(f"{live.url}/playground/tokens", json={"ids": ids, "layer": layer}).json()
        view = token_view(live.model, ids, layer)
        assert reply["texts"] == ["n", "", "é", " ", "\ufffd"]
        assert reply["dt"] == (None if view.dt is None else pytest.approx(view.dt))
        assert reply["experts"] == (None if view.experts is None else [list(choices) for choices in view.experts])
        assert reply["logprobs"] == [None, *(pytest.approx(value) for value in view.logprobs[1:])]


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        ({"ids": [], "layer": 0}, 400, "ids: List should have at least 1 item"),
        ({"ids": [256], "layer": 0}, 400, "token id 256 is beyond the vocabulary of 256"),
        ({"ids": [1], "layer": 4}, 400, "the model has no layer 4; its layers are 0 to 3"),
        ({"ids": [1], "layer": 0, "colour": 1}, 400, "unrecognized request argument: colour"),
        ({"ids": [1] * (MOST_TOKENS + 1), "layer": 0}, 422, "ids has 4097 tokens; a token view takes 4096"),
    ],
)
def test_token_views_refuse_in_one_line(live: LiveServer, body: dict[str, Any], status: int, message: str) -> None:
    reply = post(f"{live.url}/playground/tokens", json=body)
    assert reply.status_code == status
    assert reply.json()["error"]["message"].startswith(message)


def streamed(live: LiveServer, path: str, body: dict[str, Any]) -> tuple[list[int], list[int], str]:
    """Prompt ids, reply ids and text of a stream with return_token_ids."""
    options = {"model": "statespan", "max_tokens": 9, "seed": 1, "stream": True, "return_token_ids": True}
    prompt, ids, text = [], [], ""
    for line in post(f"{live.url}{path}", json=options | body).text.splitlines():
        if line.startswith("data: {"):
            choice = json.loads(line[6:])["choices"][0]
            prompt += choice.get("prompt_token_ids", [])
            ids += choice.get("token_ids", [])
            text += choice["text"] if "text" in choice else choice["delta"].get("content", "")
    return prompt, ids, text


def test_streams_tell_their_token_ids(live: LiveServer) -> None:
    """Also of tokens that complete no character, and the whole replies say the same."""
    chat = [{"role": "user", "content": "Hi"}]
    rendered = list(ChatTemplate(PLAIN).render(chat).encode())
    cases = (("/v1/completions", {"prompt": "Hi"}, list(b"Hi")), ("/v1/chat/completions", {"messages": chat}, rendered))
    for path, body, expected in cases:
        prompt, ids, text = streamed(live, path, body)
        assert prompt == expected
        assert len(ids) == 9
        assert ids == list(statespan.generate(live.model, prompt, max_new_tokens=9, seed=1).token_ids)
        options = {"model": "statespan", "max_tokens": 9, "seed": 1}
        whole = post(f"{live.url}{path}", json=options | body | {"return_token_ids": True}).json()["choices"][0]
        assert (whole["token_ids"], whole["prompt_token_ids"]) == (ids, prompt)
        assert (whole["text"] if "text" in whole else whole["message"]["content"]) == text
        assert "token_ids" not in post(f"{live.url}{path}", json=options | body).json()["choices"][0]


def test_the_playground_is_small_and_asks_nobody_else() -> None:
    texts = [file.read_text(encoding="utf-8") for file in PLAYGROUND.iterdir()]
    assert sorted(file.name for file in PLAYGROUND.iterdir()) == ["app.js", "index.html", "style.css"]
    assert sum(len(text.splitlines()) for text in texts) < 600
    for text in texts:
        assert "http" not in text.replace("http-equiv", "")
        assert not any(word in text for word in ("innerHTML", "insertAdjacentHTML", "document.write", "eval("))


# The page


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if CHROMIUM is None:
        pytest.skip("no Chromium is installed")
    with playwright.sync_playwright() as running:
        browser = running.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser: Any) -> Iterator[Callable[..., Any]]:
    """Opens the page of a server; any error in its console fails the test."""
    contexts, problems = [], list[str]()

    def open_(server: LiveServer, *, errors: bool = False, **options: Any) -> Any:
        context = browser.new_context(**{"viewport": {"width": 1280, "height": 900}} | options)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(120_000)
        page.on("pageerror", lambda error: problems.append(str(error)))
        if not errors:  # a failed request is in the console, too
            page.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
        page.goto(server.url)
        if not errors:
            page.locator("#name", has_text="statespan").wait_for()
        return page

    yield open_
    for context in contexts:
        context.close()
    assert problems == []


def setting(page: Any, **values: str | int) -> None:
    page.evaluate("document.querySelector('details').open = true")
    for name, value in values.items():
        page.fill(f"[name={name}]", str(value))


def tokens(page: Any, side: str = "a") -> list[str]:
    return page.locator(f"#{side} span").all_text_contents()


def colours(page: Any, side: str = "a") -> list[str]:
    return page.locator(f"#{side} span").evaluate_all("spans => spans.map(span => span.style.background)")


def complete(page: Any, prompt: str, count: int, *, seed: int = 1) -> None:
    """A completion, until it is there and coloured."""
    page.check("#mode-completion")
    setting(page, max_tokens=count, seed=seed, temperature=1)
    page.fill("#prompt", prompt)
    page.keyboard.press("Control+Enter")
    until(lambda: len(tokens(page)) == len(prompt) + count and colours(page)[-1] != "")


def alphas(values: list[str]) -> list[float]:
    """The share of colour in each rgba(); an opaque colour has 1."""
    return [float(value.split(",")[3].rstrip(")")) if value.startswith("rgba") else 1.0 for value in values]


def test_a_completion_streams_and_is_coloured_by_what_the_model_does(
    live: LiveServer, open_page: Callable[..., Any]
) -> None:
    page = open_page(live)
    complete(page, "def f", 12)
    ids = [*b"def f", *statespan.generate(live.model, "def f", max_new_tokens=12, seed=1).token_ids]
    view = token_view(live.model, ids, 2)
    shown = [text for text in tokens(page) if text != "·"]
    assert "".join(shown) == ByteTokenizer().decode(ids)

    surprise = [-value for value in view.logprobs[1:] if value is not None]
    expected = [0.65 * (value - min(surprise)) / (max(surprise) - min(surprise)) for value in surprise]
    assert colours(page)[0] == ""  # of the first token nothing is known
    assert alphas(colours(page)[1:]) == pytest.approx(expected, abs=ALPHA_STEP)

    page.select_option("#by", "dt")
    assert page.locator("#layer option").all_text_contents() == ["0 mamba1+moe", "2 mamba2+moe"]
    page.select_option("#layer", "2")
    assert view.dt is not None and view.experts is not None
    logs = [math.log(value) for value in view.dt]
    expected = [0.65 * (value - min(logs)) / (max(logs) - min(logs)) for value in logs]
    until(lambda: alphas(colours(page)) == pytest.approx(expected, abs=ALPHA_STEP))

    page.select_option("#by", "expert")
    experts = [choices[0] for choices in view.experts]
    until(lambda: len(set(colours(page))) == len(set(experts)))
    assert len(set(zip(colours(page), experts, strict=True))) == len(set(experts))  # one colour an expert

    page.click("#a span:nth-child(7)")
    told = page.text_content("#facts")
    assert told.startswith("A 6: ") and f"id {ids[6]}" in told and f"experts {view.experts[6][0]}, " in told


def test_the_meters_say_what_the_accounting_says(live: LiveServer, open_page: Callable[..., Any]) -> None:
    page = open_page(live)
    complete(page, "x" * 20, 12)
    assert page.text_content("#context").startswith("32 tokens")
    assert page.text_content("#state-bytes") == f"{state_bytes(CONFIG, 4) / 1024:.3g} KiB"
    assert page.text_content("#kv-bytes") == f"{32 * kv_bytes_per_token(CONFIG, 4) / 1024:.3g} KiB"
    assert page.text_content("#other-bytes") == f"{32 * 512 / 1024:.3g} KiB"
    meters = page.locator("meter").evaluate_all("meters => meters.map(meter => meter.value)")
    assert meters == [state_bytes(CONFIG, 4), 32 * 128, 32 * 512]
    assert "tokens/s, first after" in page.text_content("#speed")


def test_a_fork_goes_on_from_the_same_tokens_and_the_cache_knows_them(
    live: LiveServer, open_page: Callable[..., Any]
) -> None:
    """By keyboard alone: the text's tokens, Enter, then the branch that is kept."""
    page = open_page(live)
    prompt = "a text of some length to be shared by both of them"
    complete(page, prompt, 30)
    before = tokens(page)
    page.focus("#a")
    page.keyboard.press("End")
    for _ in range(10):
        page.keyboard.press("ArrowLeft")
    index, count = len(before) - 11, len(before) - 10
    assert page.text_content("#facts").startswith(f"A {index}: ")
    setting(page, seed=8)
    page.focus("#a")
    page.keyboard.press("Enter")
    until(lambda: len(tokens(page, "b")) == count + 30 and colours(page, "b")[-1] != "")
    assert tokens(page) == before
    ids = [*prompt.encode(), *statespan.generate(live.model, prompt, max_new_tokens=30, seed=1).token_ids][:count]
    whole = [*ids, *statespan.generate(live.model, ids, max_new_tokens=30, seed=8).token_ids]
    assert "".join(text for text in tokens(page, "b") if text != "·") == ByteTokenizer().decode(whole)
    assert tokens(page, "b")[: count - 3] == before[: count - 3]
    for side in "ab":
        assert page.locator(f"#{side} .fork").evaluate_all("spans => spans.map(span => span.dataset.index)") == [
            str(count)
        ]
    cached = int(page.text_content("#context").split("; ")[1].split()[0])
    assert len(prompt) - 1 <= cached < count

    page.click("#keep-b")
    assert page.locator("#branch-b").is_hidden()
    until(lambda: len(tokens(page)) == len(whole))
    page.click("#more")
    until(lambda: len(tokens(page)) == len(whole) + 30 and colours(page)[-1] != "")


def test_a_chat_has_turns_and_its_reply_can_be_changed_by_a_fork(
    live: LiveServer, open_page: Callable[..., Any]
) -> None:
    page = open_page(live)
    assert page.is_checked("#mode-chat")
    setting(page, max_tokens=8, seed=3)
    for turn in range(2):
        page.fill("#prompt", f"<b>turn {turn}</b> &amp;")
        page.click("#send")
        until(lambda turn=turn: page.locator(".message").count() == 2 * turn + 2 and page.is_enabled("#send"))
    messages = page.locator(".message").all_text_contents()
    assert messages[::2] == ["<b>turn 0</b> &amp;", "<b>turn 1</b> &amp;"]  # text stays text
    assert page.locator("#messages b").count() == 0
    history = [
        {"role": role, "content": text} for role, text in zip(("user", "assistant", "user"), messages, strict=False)
    ]
    body = {"model": "statespan", "messages": history, "max_tokens": 8, "seed": 3, "temperature": 0.8}
    reply = post(f"{live.url}/v1/chat/completions", json=body).json()
    assert messages[3] == reply["choices"][0]["message"]["content"]

    until(lambda: colours(page)[-1] != "")
    setting(page, seed=11, max_tokens=5)
    last = len(tokens(page)) - 8  # the reply's first token
    page.click(f"#a span:nth-child({last + 1})")
    page.click("#fork")
    until(lambda: len(tokens(page, "b")) == last + 6 and page.is_enabled("#keep-b"))
    page.click("#keep-b")
    changed = page.locator(".message").all_text_contents()
    assert changed[:3] == messages[:3] and changed[3] != messages[3]
    assert changed[3] == "".join(text for text in tokens(page)[last:] if text != "·")


def test_stop_ends_the_request(live: LiveServer, open_page: Callable[..., Any]) -> None:
    page = open_page(live)
    page.check("#mode-completion")
    setting(page, max_tokens=6000)
    page.fill("#prompt", "go")
    page.click("#send")
    until(lambda: len(tokens(page)) > 20)
    assert page.is_enabled("#stop") and page.is_disabled("#send")
    until(lambda: _running(live) == 1)
    page.keyboard.press("Escape")
    until(lambda: page.is_enabled("#send"))
    count = len(tokens(page))
    assert count < 4000 and page.locator("#error").is_hidden()
    until(lambda: _running(live) == 0)
    assert len(tokens(page)) == count


def _running(live: LiveServer) -> float:
    """Requests that the engine still works on."""
    rows = [line.rsplit(" ", 1) for line in get(f"{live.url}/metrics").text.splitlines()]
    names = ("statespan_engine_decoding{", "statespan_engine_prefilling{", "statespan_engine_waiting{")
    gauges = [float(value) for name, value in rows if name.startswith(names)]
    assert gauges
    return sum(gauges)


def test_bad_settings_are_told(live: LiveServer, open_page: Callable[..., Any]) -> None:
    page = open_page(live)
    setting(page, temperature=3)
    page.fill("#prompt", "x")
    page.click("#send")
    page.locator("#error", has_text="temperature: ").wait_for()
    assert page.input_value("#prompt") == "x"


def test_a_server_that_is_gone_is_told_and_the_message_is_kept(open_page: Callable[..., Any]) -> None:
    server = LiveServer()
    page = open_page(server, errors=True)
    page.locator("#name", has_text="statespan").wait_for()
    setting(page, max_tokens=6000)
    page.check("#mode-completion")
    page.fill("#prompt", "go")
    page.click("#send")
    until(lambda: len(tokens(page)) > 20)
    server.stop(at_once=True)  # in the middle of a reply
    page.locator("#error").wait_for()
    until(lambda: page.is_enabled("#send"))
    page.check("#mode-chat")
    page.fill("#prompt", "still there?")
    page.click("#send")
    page.locator("#error", has_text="The server cannot be reached").wait_for()
    until(lambda: page.is_enabled("#send"))
    assert page.input_value("#prompt") == "still there?"
    assert page.locator(".message").count() == 0


def test_a_key_is_asked_for_and_used(open_page: Callable[..., Any]) -> None:
    server = LiveServer(ServerOptions(api_keys=("secret",)), chat=False)
    try:
        page = open_page(server, errors=True)
        page.locator("#error", has_text="no API key was given").wait_for()
        page.fill("#key", "secret")
        page.keyboard.press("Enter")
        page.locator("#name", has_text="statespan").wait_for()
        assert page.is_disabled("#mode-chat")  # there is no template
        complete(page, "ab", 4)
        assert page.locator("#error").is_hidden()
    finally:
        server.stop()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_narrow_screen_shows_everything_readably(
    scheme: str, live: LiveServer, open_page: Callable[..., Any]
) -> None:
    page = open_page(live, color_scheme=scheme, viewport={"width": 390, "height": 844}, has_touch=True)
    complete(page, "a_very_long_word_without_any_space_in_it_that_does_not_fit_the_screen" * 2, 30)
    page.tap("#a span:nth-child(20)")
    page.tap("#fork")
    until(lambda: len(tokens(page, "b")) == 50 and page.is_enabled("#send"))
    wide = "all => all.filter(e => e.scrollWidth > e.clientWidth).map(e => e.outerHTML)"
    assert page.locator("html, section, .tokens, .row").evaluate_all(wide) == []
    for selector in ("body", "section", ".soft", "button.main", "#branch-a .tokens", "dt"):
        assert contrast(page, selector) >= 4.5, selector
    back = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(_rgb(back)) < 200) == (scheme == "dark")


def _rgb(color: str) -> list[float]:
    return [float(part) for part in color[color.index("(") + 1 : -1].split(",")][:3]


def contrast(page: Any, selector: str) -> float:
    """WCAG's contrast of an element's text with what is behind it."""
    script = """(element) => {
      let back = element;
      while (getComputedStyle(back).backgroundColor === "rgba(0, 0, 0, 0)") back = back.parentElement;
      return [getComputedStyle(element).color, getComputedStyle(back).backgroundColor];
    }"""
    light, dark = sorted((_luminance(color) for color in page.locator(selector).first.evaluate(script)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def _luminance(color: str) -> float:
    linear = [x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in (v / 255 for v in _rgb(color))]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_every_control_has_a_name_and_is_reached_by_tab(live: LiveServer, open_page: Callable[..., Any]) -> None:
    page = open_page(live)
    complete(page, "ab", 3)
    controls = page.locator("button, input, select, textarea, meter, [role=group], [role=log], [role=img]")
    nameless = (
        "e => !(e.ariaLabel || e.getAttribute('aria-labelledby') || e.textContent || (e.labels && e.labels.length))"
    )
    assert controls.evaluate_all(f"all => all.filter({nameless}).map(e => e.outerHTML)") == []
    reached = set[str]()
    for _ in range(40):
        page.keyboard.press("Tab")
        reached.add(page.evaluate("document.activeElement.id || document.activeElement.name"))
    assert {"prompt", "send", "more", "new", "by", "layer", "a", "fork", "temperature", "seed"} - reached <= {
        "fork",
        "layer",
    }
