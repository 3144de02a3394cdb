import json
import random
import re
import threading

import jsonschema
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from statespan.checkpoints.tokenizer import ByteTokenizer, FileTokenizer
from statespan.errors import UserError
from statespan.generation.options import GenerationOptions
from statespan.models.build import build
from statespan.models.config import ModelConfig
from statespan.models.layer_pattern import LayerSpec
from statespan.serving.constraint import Constraint, GrammarError, Vocabulary
from statespan.serving.engine import Engine
from statespan.serving.options import EngineOptions
from statespan.serving.request import Request
from statespan.serving.tool_calls import MARKERS, CallFormat, ToolCall, ToolCallParser

SCHEMAS = [
    {"type": "boolean"},
    {"type": "integer", "minimum": -3, "maximum": 1200},
    {"type": "array", "items": {"type": "number", "minimum": 0, "maximum": 9}, "maxItems": 2},
    {"type": "string", "maxLength": 6},
    {"type": "string", "enum": ["red", "réd", "green"]},
    {"type": "string", "pattern": "^[a-c]{2}-[0-9]{1,3}$"},
    {"type": "string", "format": "date"},
    {"const": {"a": [1, None]}},
    {"enum": [1, "1", None, [True]]},
    {"anyOf": [{"type": "null"}, {"type": "integer", "minimum": 0, "maximum": 9}]},
    {"type": "array", "items": {"type": "boolean"}, "minItems": 1, "maxItems": 3},
    {"type": "array", "prefixItems": [{"type": "boolean"}, {"enum": [7]}], "items": False},
    {
        "type": "object",
        "properties": {"name": {"type": "string", "maxLength": 4}, "age": {"type": "integer", "maximum": 99}},
        "required": ["name", "age"],
        "additionalProperties": False,
    },
    {
        "type": "object",
        "properties": {"tags": {"type": "array", "items": {"enum": ["x", "y"]}, "maxItems": 2}},
        "required": ["tags"],
        "additionalProperties": False,
    },
    {
        "$defs": {"leaf": {"type": "object", "properties": {"v": {"enum": [1, 2]}}, "additionalProperties": False}},
        "type": "object",
        "properties": {"left": {"$ref": "#/$defs/leaf"}, "right": {"$ref": "#/$defs/leaf"}},
        "required": ["left"],
        "additionalProperties": False,
    },
]
REGEXES = [r"[0-9]{3}-[0-9]{2}", r"(yes|no|née)", r"[a-f]{2,5}!", r"(\([a-z]{1,3}\)){2}", r"x?y{0,3}"]


def byte_pairs() -> FileTokenizer:
    """A GPT-2-like tokenizer with tokens of several bytes, and a begin and an end token."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    text = json.dumps(SCHEMAS) * 3
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator([text], trainer)
    return FileTokenizer(backend, bos_id=0, eos_ids=(1,))


TOKENIZERS = {"bytes": (ByteTokenizer(), 256), "byte pairs, padded": (byte_pairs(), 408)}


@pytest.fixture(params=TOKENIZERS)
def kind(request):
    return TOKENIZERS[request.param]


def write(constraint: Constraint, eos_ids: tuple[int, ...], seed: int, most: int = 400) -> list[int] | None:
    """What a random model writes under the mask; None where it found no end."""
    chance, ids = random.Random(seed), []
    while not constraint.finished:
        allowed = constraint.mask().nonzero().flatten().tolist()
        if not allowed or len(ids) == most:
            return None
        token = eos_ids[0] if eos_ids and eos_ids[0] in allowed and chance.random() < 0.3 else chance.choice(allowed)
        constraint.accept(token)
        if token not in eos_ids:
            ids.append(token)
    return ids


def texts(constraint: Constraint, kind, count: int = 8) -> list[str]:
    tokenizer, _ = kind
    found = [write(constraint.fork(), tokenizer.eos_ids, seed) for seed in range(count)]
    done = [tokenizer.decode(ids) for ids in found if ids is not None]
    assert len(done) >= count // 2
    return done


@pytest.mark.parametrize("schema", SCHEMAS, ids=str)
def test_a_random_model_writes_valid_json_only(schema, kind):
    vocabulary = Vocabulary(*kind)
    for text in texts(vocabulary.json_schema(schema), kind):
        jsonschema.validate(json.loads(text), schema, format_checker=jsonschema.FormatChecker())


@pytest.mark.parametrize("pattern", REGEXES)
def test_a_random_model_matches_the_pattern(pattern, kind):
    found = texts(Vocabulary(*kind).regex(pattern), kind, 12) if pattern != "x?y{0,3}" or kind[0].eos_ids else ["yyy"]
    assert len(set(found)) > 1 or pattern == "x?y{0,3}"
    assert all(re.fullmatch(pattern, text) for text in found)


def test_json_mode_gives_objects(kind):
    constraint = Vocabulary(*kind).json_object()
    tokenizer = kind[0]
    for text in ('{"a": [1, {"b": null}]}', "{}", '{\n  "é": "\\n\\u0007"\n}'):
        fork = constraint.fork()
        for token in tokenizer.encode(text):
            assert fork.mask()[token]
            fork.accept(token)
        assert fork.finished
    for text in ("[1]", '"a"', " {}", '{"a" 1}', "{" + " " * 40):
        fork = constraint.fork()
        with pytest.raises(GrammarError):
            for token in tokenizer.encode(text):
                assert fork.mask().shape == (kind[1],)
                fork.accept(token)


def test_the_mask_is_what_accept_takes(kind):
    """Token by token over the whole vocabulary; text that can be nothing else is wanted in the tokenizer's own form."""
    constraint = Vocabulary(*kind).json_schema(SCHEMAS[12])
    for token in kind[0].encode('{"name":"q'):
        allowed = constraint.mask()
        for other in range(kind[1]):
            try:
                constraint.fork().accept(other)
                taken = True
            except GrammarError:
                taken = False
            assert taken >= bool(allowed[other]), other
            assert taken == bool(allowed[other]) or allowed.sum() == 1, other
        constraint.accept(token)


def test_an_end_token_comes_where_the_text_may_end_only():
    tokenizer, vocab_size = TOKENIZERS["byte pairs, padded"]
    constraint = Vocabulary(tokenizer, vocab_size).regex("[0-9]{2,3}")
    ends: list[bool] = []
    for token in tokenizer.encode("1") * 3:
        ends.append(bool(constraint.mask()[1]))
        constraint.accept(token)
    assert ends == [False, False, True] and constraint.finished
    early = Vocabulary(tokenizer, vocab_size, eos_ids=(1, 5)).regex("[0-9]{2,3}")
    for token in tokenizer.encode("1") * 2:
        early.accept(token)
    assert early.mask()[1] and early.mask()[5] and not early.finished
    early.accept(5)
    assert early.finished


def test_special_tokens_and_padding_are_never_text():
    tokenizer, vocab_size = TOKENIZERS["byte pairs, padded"]
    allowed = Vocabulary(tokenizer, vocab_size).regex(r"(?s:.*)").mask()
    assert not allowed[0] and not allowed[400:].any() and allowed[1]
    # "<s>" as text is allowed, in tokens that are text.
    constraint = Vocabulary(tokenizer, vocab_size).regex("<s>")
    assert not constraint.mask()[0] and constraint.mask().any()


def test_without_an_end_token_a_finished_text_ends():
    constraint = Vocabulary(ByteTokenizer(), 256).regex("ab?")
    constraint.accept(ord("a"))
    assert not constraint.finished and constraint.mask().nonzero().flatten().tolist() == [ord("b")]
    constraint.accept(ord("b"))
    assert constraint.finished and not constraint.mask().any()


CLOSED = '{"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"], "additionalProperties": false}'
CALLS = (("add", CLOSED), ("now", '{"type": "object", "additionalProperties": false}'))


@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize("markers", MARKERS, ids=str)
def test_a_random_model_writes_calls_only(markers, several, kind):
    """What comes is read by the parser of replies, and is what the functions' schemas say."""
    found: list[tuple[ToolCall, ...]] = []
    for text in texts(Vocabulary(*kind).tool_calls(CallFormat(markers, CALLS, several)), kind, count=12):
        parser = ToolCallParser(markers)
        rest, calls = parser.push(text), parser.finish()
        assert (rest + calls[0]).strip() == "" and calls[1]
        assert {call.name for call in calls[1]} <= {"add", "now"}
        assert all(json.loads(c.arguments)["a"] in (1, 2) for c in calls[1] if c.name == "add")
        found.append(tuple(calls[1]))
    assert len(found) > 2 and (several or {len(calls) for calls in found} == {1})


def test_marks_that_are_special_tokens_are_these_tokens():
    tokenizer = byte_pairs()
    tokenizer.backend.add_special_tokens(["<tool_calls>", "</tool_calls>"])
    size = tokenizer.backend.get_vocab_size()
    opening, closing = map(tokenizer.backend.token_to_id, MARKERS[0])
    constraint = Vocabulary(tokenizer, size).tool_calls(CallFormat(MARKERS[0], (("f", '{"maxProperties": 0}'),)))
    assert constraint.mask().nonzero().flatten().tolist() == [opening]
    for token in (opening, *tokenizer.backend.encode('[{"name": "f", "arguments": {}}]').ids):
        constraint.accept(token)
    assert constraint.mask()[closing] and not constraint.finished
    constraint.accept(closing)
    assert constraint.finished


def test_a_function_nobody_can_call():
    with pytest.raises(GrammarError, match="schema of a function's parameters cannot be used"):
        Vocabulary(ByteTokenizer(), 256).tool_calls(CallFormat(MARKERS[1], (("f", '{"type": 1}'),)))


def test_forks_go_their_own_ways():
    constraint = Vocabulary(ByteTokenizer(), 256).regex("(ab|cd)e")
    other = constraint.fork()
    constraint.accept(ord("a"))
    other.accept(ord("c"))
    assert constraint.mask().nonzero().flatten().tolist() == [ord("b")]
    assert other.mask().nonzero().flatten().tolist() == [ord("d")]
    again = other.fork()
    other.accept(ord("d"))
    assert again.mask().nonzero().flatten().tolist() == [ord("d")]


@pytest.mark.parametrize(
    ("schema", "told"),
    [
        ({"type": "strin"}, "strin"),
        ("{", "Expecting"),
        ("[1]", "an object, got list"),
        ("nonsense", "Expecting value"),
        ({"not": {"type": "string"}}, "not"),
        ({"type": "string", "pattern": "(?=a)b"}, "look-around"),
        ({"$ref": "#/nowhere"}, "nowhere"),
        ({"allOf": [{"type": "string"}, {"type": "integer"}]}, "Unsatisfiable"),
        ({"enum": [{1, 2}]}, "serializable"),
    ],
    ids=str,
)
def test_a_bad_schema_is_one_line(schema, told):
    with pytest.raises(GrammarError, match=told) as caught:
        Vocabulary(ByteTokenizer(), 256).json_schema(schema)
    assert isinstance(caught.value, UserError) and "\n" not in str(caught.value) and len(str(caught.value)) < 220


def test_deep_nesting_is_refused():
    schema: object = {"type": "null"}
    for _ in range(3000):
        schema = {"type": "array", "items": schema}
    with pytest.raises(GrammarError):
        Vocabulary(ByteTokenizer(), 256).json_schema(schema)  # type: ignore[arg-type]  # built in a loop


@pytest.mark.parametrize(("pattern", "told"), [("a(b", "unclosed group"), (r"(?<=a)b", "look-around")])
def test_a_bad_pattern_is_one_line(pattern, told):
    with pytest.raises(GrammarError, match=told) as caught:
        Vocabulary(ByteTokenizer(), 256).regex(pattern)
    assert "\n" not in str(caught.value)


def test_a_wrong_token_is_refused_and_harms_nothing():
    constraint = Vocabulary(ByteTokenizer(), 256).regex("ab")
    with pytest.raises(GrammarError, match="token 98"):
        constraint.accept(ord("b"))
    constraint.accept(ord("a"))
    assert constraint.mask().nonzero().flatten().tolist() == [ord("b")]


def test_a_vocabulary_that_cannot_write_the_text():
    backend = Tokenizer(models.BPE({"yes": 0, "no": 1, "?": 2}, []))
    backend.decoder = decoders.ByteLevel()
    vocabulary = Vocabulary(FileTokenizer(backend), 3)
    constraint = vocabulary.regex("maybe")
    with pytest.raises(GrammarError, match="no token"):
        constraint.mask()
    assert vocabulary.regex("yes|no").mask().tolist() == [True, True, False]


def test_another_kind_of_tokenizer():
    class Words(ByteTokenizer.__base__):
        vocab_size, bos_id, eos_ids = 3, None, ()

    with pytest.raises(UserError, match=r"byte-level tokenizer or a tokenizer\.json"):
        Vocabulary(Words(), 3)


def test_threads_share_a_vocabulary():
    vocabulary = Vocabulary(ByteTokenizer(), 256)
    found: dict[int, str] = {}

    def run(number: int) -> None:
        ids = write(vocabulary.regex(f"{number}[a-z]{{20}}"), (), number)
        found[number] = bytes(ids or []).decode()

    threads = [threading.Thread(target=run, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(re.fullmatch(f"{number}[a-z]{{20}}", found[number]) for number in range(8))


def test_the_mask_meets_logits():
    constraint = Vocabulary(ByteTokenizer(), 256).regex("[xyz]")
    logits = torch.randn(256, generator=torch.Generator().manual_seed(0))
    best = int(logits.masked_fill(~constraint.mask(), -torch.inf).argmax())
    assert best == max(map(ord, "xyz"), key=lambda token: float(logits[token]))


@pytest.mark.parametrize("num_drafts", [0, 4])
def test_requests_of_an_engine_keep_to_their_grammars(num_drafts):
    """A random byte model, several requests at once, samples that fork, with and without speculation beside them."""
    model = build(ModelConfig(vocab_size=256, hidden_size=16, layers=(LayerSpec("mamba1", "mlp"),)), seed=0)
    model.tokenizer = ByteTokenizer()
    vocabulary = Vocabulary(model.tokenizer, 256)
    engine = Engine(model, EngineOptions(num_pages=8, num_drafts=num_drafts))
    options = GenerationOptions(max_new_tokens=300, temperature=0.7, seed=3)
    schema = SCHEMAS[12]
    requests = [
        Request(tuple(b"say it: "), options, id="regex", num_samples=3, constraint=vocabulary.regex(r"[a-d]{3,9}!")),
        Request(tuple(b"now json "), options, id="json", num_samples=2, constraint=vocabulary.json_schema(schema)),
        Request(tuple(b"free" * 5), GenerationOptions(max_new_tokens=20, temperature=0), id="free"),
    ]
    for request in requests:
        engine.submit(request)
    texts: dict[tuple[str, int], str] = {}
    reasons: dict[tuple[str, int], str | None] = {}
    while not engine.idle:
        for event in engine.step():
            assert event.error is None
            place = (event.request_id, event.index)
            texts[place] = texts.get(place, "") + event.text
            reasons[place] = event.finish_reason
    assert all(re.fullmatch(r"[a-d]{3,9}!", texts["regex", index]) for index in range(3))
    assert len({texts["regex", index] for index in range(3)}) > 1
    for index in range(2):
        jsonschema.validate(json.loads(texts["json", index]), schema)
    assert {reason for (name, _), reason in reasons.items() if name != "free"} == {"stop"}
