"""How processes share the tests on real parts."""

from __future__ import annotations

from pathlib import Path

import pytest

from metrics_pipeline_tests import integration
from metrics_pipeline_tests.conftest import OWN_STACKS, scope

MODULES = {path.stem: path.read_text("utf-8") for path in Path(integration.__file__).parent.glob("test_*.py")}


def test_modules_that_do_not_use_the_shared_stack_are_known_to_have_their_own() -> None:
    assert MODULES.keys() >= OWN_STACKS
    assert {name for name, text in MODULES.items() if "RunningStack" not in text} <= OWN_STACKS


@pytest.mark.parametrize(
    ("nodeid", "expected"),
    [
        ("metrics_pipeline_tests/integration/test_keeper.py::test_a[b::c.py]", "stacks of their own"),
        ("metrics_pipeline_tests/integration/test_two_stacks.py::test_b", "stacks of their own"),
        ("metrics_pipeline_tests/integration/test_verify.py::test_c[x/y]", "test_verify"),
    ],
)
def test_stacks_of_their_own_stay_together(nodeid: str, expected: str) -> None:
    assert scope(nodeid) == expected
