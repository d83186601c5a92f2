"""The interface under /api does what its schema says, whatever it is asked: schemathesis tries."""

from dataclasses import replace

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given
from hypothesis import settings as effort
from hypothesis.errors import Unsatisfiable
from schemathesis import GenerationMode
from schemathesis.specs.openapi.checks import positive_data_acceptance

from workingpapers.desk.page.app import create_app
from workingpapers.desk.page.guard import COOKIE, HEADER, sign

EXAMPLES = 20  # of each kind, for each operation
SKIPPED = [positive_data_acceptance]  # that a text is a mail address, or a listing, is more than a schema can say
READER = "0123456789abcdef" * 2
EFFORT = effort(
    max_examples=EXAMPLES,
    derandomize=True,
    database=None,
    deadline=None,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
)


@pytest.fixture
def app(settings):
    """The page as it is without its background work: runs are queued and mails are written down, but none is done."""
    made = create_app(replace(settings, hosts=("testserver",)))
    yield made
    made.state.site.close()


@pytest.mark.timeout(120)
@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE], ids=["legal", "illegal"])
def test_every_operation_keeps_to_the_schema(app, mode):
    """No 500; statuses, media types and bodies are those of the schema; what is illegal is refused."""
    schema = schemathesis.openapi.from_asgi("/api/openapi.json", app)
    allowed = {HEADER: sign(app.state.site.secret, "reader", READER)}
    tried = set()

    def attempt(operation):
        @EFFORT
        @given(case=operation.as_strategy(generation_mode=mode))
        def call(case):
            tried.add(operation.label)
            answer = case.call(headers=allowed, cookies={COOKIE: READER})
            case.validate_response(answer, excluded_checks=SKIPPED)

        call()

    problems, without = [], []
    for found in schema.get_all_operations():
        operation = found.ok()
        try:
            attempt(operation)
        except Unsatisfiable:  # an operation without parameters cannot be asked for anything illegal
            without.append(operation.label)
        except (Exception, BaseExceptionGroup) as problem:
            problems.append(f"{operation.label}: {problem}")
    assert not problems, "\n\n".join(problems)
    assert len(tried) >= 10
    assert mode is GenerationMode.NEGATIVE or not without
