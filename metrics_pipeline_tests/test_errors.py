"""The error tree: what people see, and what a shell sees."""

from __future__ import annotations

import inspect
import re

import pytest

from metrics_pipeline import errors
from metrics_pipeline.errors import PipelineError, RecordError, SettingError

CLASSES = [
    found
    for _, found in inspect.getmembers(errors, inspect.isclass)
    if issubclass(found, PipelineError) and found is not PipelineError
]


def test_the_tree_in_the_docstring_is_the_tree() -> None:
    assert errors.__doc__ is not None
    assert set(re.findall(r"── (\w+)", errors.__doc__)) == {found.__name__ for found in CLASSES}
    assert all(found.__base__ is PipelineError for found in CLASSES)


@pytest.mark.parametrize("found", CLASSES)
def test_no_error_ends_a_command_with_success(found: type[PipelineError]) -> None:
    assert found.exit_code == (2 if found is SettingError else 1)


def test_a_refused_record_carries_a_code_to_count_by() -> None:
    error = RecordError("bad_uuid", "device_id 'x'")
    assert (error.reason, error.detail, str(error)) == ("bad_uuid", "device_id 'x'", "bad_uuid: device_id 'x'")
