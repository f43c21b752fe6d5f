"""A recipe and files: what is in them, and, when that is as it should be, published."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from metrics_pipeline.errors import SettingError
from metrics_pipeline.producer.run import RunReport, run_producer
from metrics_pipeline.replay.recipe import Recipe, presets
from metrics_pipeline.replay.selection import selected
from metrics_pipeline.replay.source import Replay, open_replay
from metrics_pipeline.settings import Settings


@contextmanager
def prepared(
    settings: Settings,
    files: Sequence[Path],
    recipe: Recipe,
    *,
    skip_bad: bool = False,
    allow_implausible: bool = False,
) -> Iterator[Replay]:
    """Files that are understood, ready to be looked at and published; what SQL makes of them is kept until the end.

    Args:
        settings: where temporary files may be.
        files: CSV, JSON and Parquet, in any mixture.
        recipe: what they mean.
        skip_bad: whether bad records are left out rather than refused.
        allow_implausible: whether values that are not possible are published.

    Raises:
        SettingError: a file cannot be read, or something is missing or ambiguous; says what to give.
    """
    if recipe.select is None:
        yield open_replay(files, recipe, skip_bad=skip_bad, allow_implausible=allow_implausible)
        return
    if not files:
        raise SettingError("replay needs at least one file: metrics-pipeline replay FILE…")
    with selected(recipe.select, files, recipe, settings.data_dir) as results:
        yield Replay(results, recipe, batch_size=10_000, skip_bad=skip_bad, allow_implausible=allow_implausible)


def publish(settings: Settings, source: Replay, **options: Any) -> RunReport:
    """Publish what was looked at; takes the options of `run_producer`.

    Raises:
        RecordError: a record is bad, or there is no reading.
        PipelineError: what ended the run.
    """
    source.refuse()
    return run_producer(settings, source.messages(), kind="replay", **options)


def listed_presets() -> list[str]:
    """A line for each preset."""
    return [f"{name:<24} {recipe.description}" for name, recipe in presets().items()]
