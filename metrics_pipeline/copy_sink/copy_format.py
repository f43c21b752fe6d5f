"""Readings in the binary format of COPY, made column by column."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from metrics_pipeline.copy_sink.canonical import ReadingColumns

BEGIN: Final = b"PGCOPY\n\xff\r\n\0" + bytes(8)
"""Signature, flags and the length of the header's extension (PostgreSQL's documentation of COPY, Binary Format)."""
END: Final = b"\xff\xff"

_FIELDS: Final = (("device_id", "V16"), ("published_at", ">i8"), ("metric_name", ">i2"), ("value", ">f8"))


def _layout(tag_bytes: int) -> np.dtype[Any]:
    fields: list[tuple[str, str]] = [("fields", ">i2")]
    for name, kind in _FIELDS:
        fields += [(f"{name}_size", ">i4"), (name, kind)]
    return np.dtype([*fields, ("tags_size", ">i4"), ("tags", f"V{tag_bytes}")])


def copy_rows(columns: ReadingColumns, encoded_tags: Sequence[bytes]) -> Iterator[bytes | memoryview]:
    """The data of a binary COPY into device_id, published_at, metric_name, value, tags: header, rows, end.

    Rows come grouped by the length of their tags, because numpy writes rows of one width at a time, and within that by device (by
    the first bytes of its UUID, which is cheap): PostgreSQL then meets each page of the primary key once a batch, and two writers
    are seldom at the same one.
    """
    yield BEGIN
    columns = columns.take(np.argsort(columns.device_id.view(">u2")[:, 0].astype(np.uint16), kind="stable"))
    used = np.unique(columns.tags)
    sizes = np.array([len(encoded_tags[number]) for number in used.tolist()], np.int64)
    # Where each tag number stands among those used.
    place = np.zeros(int(used[-1]) + 1 if len(used) else 0, np.int64)
    place[used] = np.arange(len(used))
    places = place[columns.tags]
    for size in np.unique(sizes).tolist():
        alike = np.flatnonzero(sizes == size)
        texts = np.zeros(len(used), f"V{size}")
        texts[alike] = np.frombuffer(b"".join(encoded_tags[used[at]] for at in alike.tolist()), f"V{size}")
        which: npt.NDArray[Any] | slice = (
            slice(None) if len(alike) == len(used) else np.flatnonzero(sizes[places] == size)
        )
        yield _rows(columns, which, size, texts[places[which]])
    yield END


def _rows(columns: ReadingColumns, which: npt.NDArray[Any] | slice, size: int, tags: npt.NDArray[Any]) -> memoryview:
    rows = np.empty(len(tags), _layout(size))
    rows["fields"] = len(_FIELDS) + 1
    for name, _ in _FIELDS:
        rows[f"{name}_size"] = rows.dtype[name].itemsize
    rows["device_id"] = columns.device_id[which].view("V16")[:, 0]
    rows["published_at"] = columns.published_at[which]
    rows["metric_name"] = columns.metric_name[which]
    rows["value"] = columns.value[which]
    rows["tags_size"] = size
    rows["tags"] = tags
    return rows.view(np.uint8).data
