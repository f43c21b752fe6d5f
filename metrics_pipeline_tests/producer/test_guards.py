"""What holds a producer back."""

from __future__ import annotations

import shutil
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest

from metrics_pipeline.errors import InstallError, ServiceError
from metrics_pipeline.kafka import TopicWatch
from metrics_pipeline.producer import guards
from metrics_pipeline.producer.guards import LagWatch, LogGuard, check_disk
from metrics_pipeline.settings import TOPIC
from metrics_pipeline_tests.fake_kafka import FakeAdmin, FakeBroker, FakeTopic
from metrics_pipeline_tests.fakes import until


@pytest.mark.parametrize(("limit", "stops"), [(5.0, True), (4.0, False), (0.0, False)])
def test_disk_free_limit_decides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: float, stops: bool) -> None:
    asked: list[Path] = []

    def usage(place: Path) -> SimpleNamespace:
        asked.append(place)
        return SimpleNamespace(free=4.5 * 2**30)

    monkeypatch.setattr(shutil, "disk_usage", usage)
    folder = tmp_path / "not" / "there yet"
    if stops:
        with pytest.raises(InstallError, match=r"4\.5 GiB are free .* below DISK_FREE_LIMIT_GB=5: .*lower DISK_FREE"):
            check_disk(folder, limit)
    else:
        check_disk(folder, limit)
    assert asked == [tmp_path]


@pytest.fixture(autouse=True)
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guards, "LAG_SECONDS", 0.01)


def test_lag_pauses_and_resumes() -> None:
    lag = [10_000]
    watch = LagWatch(lambda: lag[0], 10_000)
    watch.start()
    assert until(lambda: watch.paused)
    assert watch.paused == "consumer lag is 10,000 records, PRODUCER_MAX_LAG is 10,000: waiting for the sink"
    lag[0] = 9_999
    assert until(lambda: watch.paused is None)
    watch.stop()


def test_an_answer_that_fails_leaves_the_last_one_standing() -> None:
    answers = iter([100])
    asked = []

    def lag() -> int:
        asked.append(1)
        return next(answers)

    watch = LagWatch(lag, 50)
    watch.start()
    assert until(lambda: len(asked) > 3)
    assert watch.paused
    watch.stop()


def test_a_slow_answer_holds_nobody_up() -> None:
    asked, let_go = threading.Event(), threading.Event()

    def lag() -> int:
        asked.set()
        let_go.wait(30)
        return 1

    watch = LagWatch(lag, 1)
    watch.start()
    assert asked.wait(5)
    assert watch.paused is None
    watch.stop()
    assert watch._thread.is_alive()  # it still waits for its answer
    let_go.set()


def test_a_run_ends_when_its_topic_is_another_one() -> None:
    broker = FakeBroker(topics={TOPIC: FakeTopic(1, {0: (0, 0)}, {})})
    guard = LogGuard(TopicWatch(FakeAdmin(broker, {})))  # type: ignore[arg-type]
    guard.begin()
    assert guard.log_id == "fake/AAAAAAAAAAAAAAAAAAAAAQ"
    for _ in range(3):
        guard.check()
    broker.topic_ids[TOPIC] = 2
    guard.check()  # an answer from before
    with pytest.raises(ServiceError, match="is another one than when this run began: log fake/"):
        guard.check()


def test_a_run_that_begins_without_an_answer_learns_its_log_later() -> None:
    broker = FakeBroker()
    guard = LogGuard(TopicWatch(FakeAdmin(broker, {})))  # type: ignore[arg-type]
    guard.begin()
    assert guard.log_id == ""
    broker.topics[TOPIC] = FakeTopic(1, {0: (0, 0)}, {})
    for _ in range(3):
        guard.check()
    assert guard.log_id == "fake/AAAAAAAAAAAAAAAAAAAAAQ"
