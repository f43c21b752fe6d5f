-- What changes: readings that come one by one (removed is false) and those that go, by device, metric, slot and minute.
CREATE TEMPORARY TABLE summary_delta (
    device_id uuid NOT NULL,
    metric_name smallint NOT NULL,
    slot timestamptz NOT NULL,
    minute timestamptz NOT NULL,
    removed boolean NOT NULL,
    rows bigint NOT NULL,
    total numeric NOT NULL,
    min double precision NOT NULL,
    max double precision NOT NULL,
    first_seen timestamptz NOT NULL,
    last_seen timestamptz NOT NULL
) ON COMMIT DROP;

-- Readings that come and go, by minute: all of them, also those that come by statements.
CREATE TEMPORARY TABLE summary_minutes (
    minute timestamptz NOT NULL,
    rows bigint NOT NULL
) ON COMMIT DROP;

-- What was put by for the devices, while it is folded in.
CREATE TEMPORARY TABLE summary_pending (
    device_id uuid NOT NULL,
    metric_name smallint NOT NULL,
    slot timestamptz NOT NULL,
    rows bigint NOT NULL,
    total numeric NOT NULL,
    min double precision NOT NULL,
    max double precision NOT NULL,
    first_seen timestamptz NOT NULL,
    last_seen timestamptz NOT NULL
) ON COMMIT DROP;

-- Whose extreme reading went, so that the next one has to be looked for.
CREATE TEMPORARY TABLE summary_stale (
    device_id uuid NOT NULL,
    metric_name smallint NOT NULL,
    slot timestamptz,
    min boolean NOT NULL,
    max boolean NOT NULL,
    first_seen boolean NOT NULL,
    last_seen boolean NOT NULL
) ON COMMIT DROP
