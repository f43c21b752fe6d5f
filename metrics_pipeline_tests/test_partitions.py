"""Which partitions are due at a time: aligned, without a gap, named by their begin."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta, timezone

import pytest

from metrics_pipeline import partitions
from metrics_pipeline.settings import PartitionWidth, Settings

NOW = datetime(2026, 11, 26, 7, 14, 31, 250_000, UTC)


def of(width: PartitionWidth) -> Settings:
    return Settings(_env_file=None, metrics_partition=width)


@pytest.mark.parametrize(
    ("width", "bound"),
    [
        ("minute", datetime(2026, 11, 26, 7, 15, tzinfo=UTC)),
        ("hour", datetime(2026, 11, 26, 8, tzinfo=UTC)),
        ("day", datetime(2026, 11, 27, tzinfo=UTC)),
        ("month", datetime(2026, 12, 1, tzinfo=UTC)),
    ],
)
def test_a_bound_is_the_next_full_one_in_utc(width: PartitionWidth, bound: datetime) -> None:
    assert partitions.bound_after(width, NOW) == bound
    assert partitions.bound_after(width, NOW.astimezone(timezone(timedelta(hours=5, minutes=30)))) == bound
    assert partitions.bound_after(width, bound) > bound, "a bound is not after itself"
    before = partitions.bound_before(width, NOW)
    assert before <= NOW
    assert partitions.bound_after(width, before) == bound
    assert partitions.bound_before(width, bound) == bound


def test_months_have_their_own_lengths() -> None:
    bound, months = datetime(2027, 1, 1, tzinfo=UTC), []
    for _ in range(14):
        months.append(bound)
        bound = partitions.bound_after("month", bound)
    assert [month.day for month in months] == [1] * 14
    assert [month.month for month in months] == [*range(1, 13), 1, 2]


@pytest.mark.parametrize(
    ("width", "first", "count"),
    [
        ("minute", "metrics_p202611260700", 20),
        ("hour", "metrics_p2026112607", 25),
        ("day", "metrics_p20261126", 5),
        ("month", "metrics_p202611", 3),
    ],
)
def test_they_reach_ahead_without_a_gap(width: PartitionWidth, first: str, count: int) -> None:
    last = NOW.replace(minute=0, second=0, microsecond=0)
    wanted = partitions.due(of(width), last, NOW)
    assert wanted[0][:2] == (first, last)
    assert len(wanted) == count == len({name for name, _, _ in wanted})
    assert [low for _, low, _ in wanted[1:]] == [high for _, _, high in wanted[:-1]]
    assert wanted[-1][2] >= NOW + partitions.AHEAD[width]
    assert partitions.due(of(width), wanted[-1][2], NOW) == []


def test_a_wider_one_begins_where_the_last_one_ends() -> None:
    last = datetime(2026, 11, 26, 13, tzinfo=UTC)
    assert partitions.due(of("day"), last, NOW)[0] == ("metrics_p20261126", last, datetime(2026, 11, 27, tzinfo=UTC))


@pytest.mark.parametrize(
    ("name", "low"),
    [
        ("metrics_p202611", datetime(2026, 11, 1, tzinfo=UTC)),
        ("metrics_p20261127", datetime(2026, 11, 27, tzinfo=UTC)),
        ("metrics_p20261127.2", datetime(2026, 11, 27, tzinfo=UTC)),
        ("metrics_p2026112707", datetime(2026, 11, 27, 7, tzinfo=UTC)),
        ("metrics_p202611270731", datetime(2026, 11, 27, 7, 31, tzinfo=UTC)),
        ("metrics_p20261327", None),
        ("metrics_p2026112", None),
        ("metrics_p20261127x", None),
        ("metrics_before", None),
        ("notes", None),
    ],
)
def test_a_name_says_when_it_begins(name: str, low: datetime | None) -> None:
    assert partitions.low_of(name) == low


def whole(*found: partitions.Piece) -> None:
    """One begins where the other ends, and no two have the same name."""
    assert [low for _, low, _ in found[1:]] == [high for _, _, high in found[:-1]]
    assert all(high is None or low < high for _, low, high in found)
    assert len({name for name, _, _ in found}) == len(found)


BEGIN = datetime(2026, 12, 1, tzinfo=UTC)
DAY = timedelta(days=1)


def test_the_last_one_is_split_where_its_readings_are() -> None:
    last = partitions.Partition(partitions.LAST, BEGIN, None, 0, 0)
    wanted = partitions.due(of("day"), BEGIN, BEGIN)
    far = datetime(2027, 11, 26, tzinfo=UTC)
    found = partitions.pieces("day", last, wanted, [far, far + 3 * DAY], None)
    whole(*found)
    assert found[: len(wanted)] == wanted
    names = [name for name, _, _ in found[len(wanted) :]]
    ahead = [f"metrics_p{far + day * DAY:%Y%m%d}" for day in range(4, 4 + partitions.PIECES_AHEAD)]
    assert names == [
        "metrics_gap_20261205000000",
        "metrics_p20271126",
        "metrics_gap_20271127000000",
        "metrics_p20271129",
        *ahead,
        partitions.LAST,
    ]


def test_readings_everywhere_make_a_wide_one() -> None:
    last = partitions.Partition(partitions.LAST, BEGIN, None, 0, 0)
    scattered = partitions.pieces("day", last, [], [], (BEGIN + 30 * DAY, BEGIN + 4000 * DAY + DAY / 2))
    whole(*scattered)
    assert [(low, high) for _, low, high in scattered] == [
        (BEGIN, BEGIN + 30 * DAY),
        (BEGIN + 30 * DAY, BEGIN + 4001 * DAY),
        (BEGIN + 4001 * DAY, None),
    ]
    many = partitions.pieces("day", last, [], [BEGIN + 2 * n * DAY for n in range(100)], None)
    whole(*many)
    assert len(many) < 4
    in_a_row = partitions.pieces("hour", last, [], [BEGIN + n * DAY / 24 for n in range(100)], None)
    whole(*in_a_row)
    assert [name for name, _, _ in in_a_row] == ["metrics_wide_20261201000000", partitions.LAST]


def test_a_gap_keeps_its_end() -> None:
    gap = partitions.Partition("metrics_gap_20261201000000", BEGIN, BEGIN + 10 * DAY, 0, 0)
    assert partitions.due(of("month"), BEGIN, BEGIN + 20 * DAY, BEGIN + 10 * DAY) == [
        ("metrics_p202612", BEGIN, BEGIN + 10 * DAY)
    ]
    found = partitions.pieces("day", gap, [], [BEGIN + 9 * DAY], None)
    whole(*found)
    assert found[-1] == ("metrics_p20261210", BEGIN + 9 * DAY, BEGIN + 10 * DAY)
    assert partitions.pieces("day", gap, [], [], None) == [(gap.name, BEGIN, BEGIN + 10 * DAY)]


def test_the_end_of_time_has_a_place() -> None:
    last = partitions.Partition(partitions.LAST, BEGIN, None, 0, 0)
    dense = datetime(9999, 11, 30, tzinfo=UTC)
    found = partitions.pieces("day", last, [], [dense], None)
    whole(*found)
    assert found[-1][0] == partitions.LAST
