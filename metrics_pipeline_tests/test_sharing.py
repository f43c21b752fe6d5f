"""How processes share the tests on real parts."""

from __future__ import annotations

from pathlib import Path

import pytest

from metrics_pipeline_tests import integration
from metrics_pipeline_tests.conftest import WHOLE_STACKS, scope

MODULES = {path.stem: path.read_text("utf-8") for path in Path(integration.__file__).parent.glob("test_*.py")}


def test_modules_that_start_whole_stacks_are_known() -> None:
    assert MODULES.keys() >= WHOLE_STACKS
    assert {name for name, text in MODULES.items() if '"--detach"' in text or "own_pipeline" in text} <= WHOLE_STACKS


@pytest.mark.parametrize(
    ("nodeid", "expected"),
    [
        ("metrics_pipeline_tests/integration/test_keeper.py::test_a[b::c.py]", "whole stacks"),
        ("metrics_pipeline_tests/integration/test_two_stacks.py::test_b", "whole stacks"),
        ("metrics_pipeline_tests/integration/test_verify.py::test_c[x/y]", "test_verify"),
    ],
)
def test_whole_stacks_stay_together(nodeid: str, expected: str) -> None:
    assert scope(nodeid) == expected
