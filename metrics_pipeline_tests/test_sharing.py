"""How processes share the tests on real parts."""

from __future__ import annotations

from pathlib import Path

from metrics_pipeline_tests import integration

MODULES = {path.stem: path.read_text("utf-8") for path in Path(integration.__file__).parent.glob("test_*.py")}


def test_modules_that_start_whole_stacks_are_marked() -> None:
    """Beside another process' tests, two stacks with Dagster keep two cores so busy that nothing moves any more."""
    starting = {name for name, text in MODULES.items() if '"--detach"' in text or "own_pipeline" in text}
    assert len(starting) > 5
    assert starting <= {name for name, text in MODULES.items() if "pytest.mark.whole_stack" in text}
