"""Whatever comes: no 500, no crash, one line of error; and the server still answers afterwards."""

from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_schema_conformance,
    status_code_conformance,
)

from benchmarks.serving_fuzz import attack
from statespan.generation.generate import generate
from statespan.models.language_model import LanguageModel

CHECKS = [not_a_server_error, content_type_conformance, response_schema_conformance, status_code_conformance]


def test_hostile_bodies(server: Any, model: LanguageModel) -> None:
    statuses = attack(server.url, "tiny", 400, seed=1)
    assert min(statuses[200], statuses[400]) > 30, statuses
    reply = server.post("completions", prompt="Hello", max_tokens=8, temperature=0).json()
    assert reply["choices"][0]["text"] == generate(model, "Hello", max_new_tokens=8, temperature=0).text


def test_a_long_name_is_not_repeated_in_full(server: Any) -> None:
    reply = server.post("completions", prompt="a", logit_bias={"a" * 5000: 101})
    error = reply.json()["error"]
    assert reply.status_code == 400 and len(error["message"]) < 620 and len(error["param"]) < 620
    assert error["message"].startswith("logit_bias.aaa") and error["message"].endswith("less than or equal to 100")


@pytest.mark.parametrize("mode", list(GenerationMode), ids=lambda mode: mode.value)
def test_the_apis_own_description(server: Any, mode: GenerationMode) -> None:
    """schemathesis makes requests from /openapi.json, right and wrong ones, and holds the replies against it."""
    schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    operations = {result.ok().label: result.ok() for result in schema.get_all_operations()}
    assert {"POST /v1/completions", "POST /v1/chat/completions", "POST /v1/embeddings"} <= set(operations)
    checks = CHECKS if mode is GenerationMode.POSITIVE else [*CHECKS, negative_data_rejection]
    for operation in operations.values():
        if mode is GenerationMode.NEGATIVE and operation.method.upper() == "GET":
            continue  # without parameters there is nothing to get wrong

        @given(case=operation.as_strategy(generation_mode=mode))
        @settings(
            max_examples=10, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
        )
        def check(case: Any) -> None:
            case.call_and_validate(checks=checks)

        check()
