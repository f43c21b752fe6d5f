-- The summaries by device cost what is new with a large fleet, too: a tick no longer looks up a row for each device and metric.
--
-- A tick appends what came to `device_deltas`, many entries a row: a tenth of what it costs to change the rows of as many devices. When there
-- are several times as many of these entries as rows that they change, those of the same device, metric and hour become one; when that
-- leaves too many, or when readings went, they are folded into `device_slots`.
-- Slots that are over go into `device_metric_totals`, once. All three together are exact at every tick: views add them up.

-- migrate:up

SET LOCAL lock_timeout = '10s';
SET LOCAL statement_timeout = '1h';

-- First of all, since a tick holds it from its begin.
ALTER TABLE summary_state ADD COLUMN pending bigint NOT NULL DEFAULT 0;
ALTER TABLE summary_state ADD COLUMN folded bigint NOT NULL DEFAULT 0;
ALTER TABLE summary_state ADD COLUMN settled_before timestamptz NOT NULL DEFAULT '0001-01-01 00:00:00+00';
COMMENT ON COLUMN summary_state.pending IS 'entries in device_deltas';
COMMENT ON COLUMN summary_state.folded IS 'rows of device_slots that the last fold changed: the price that is to be spread';
COMMENT ON COLUMN summary_state.settled_before IS 'slots that begin earlier are contained in device_metric_totals';

DROP TABLE device_summary;
DROP TABLE device_metric_summary;

CREATE TABLE device_metric_totals (
    device_id uuid NOT NULL,
    metric_name smallint NOT NULL,
    rows bigint NOT NULL,
    total numeric NOT NULL,
    min double precision NOT NULL,
    max double precision NOT NULL,
    first_seen timestamptz NOT NULL,
    last_seen timestamptz NOT NULL,
    CONSTRAINT device_metric_totals_pkey PRIMARY KEY (device_id, metric_name)
) WITH (fillfactor = 50);
COMMENT ON TABLE device_metric_totals IS 'Per device and metric what the slots before summary_state.settled_before contain.';

CREATE TYPE device_entry AS (
    device_id uuid,
    metric_name smallint,
    slot timestamptz,
    rows bigint,
    ten_thousandths bigint,
    others numeric,
    min double precision,
    max double precision,
    first_seen timestamptz,
    last_seen timestamptz
);
COMMENT ON TYPE device_entry IS
    'Readings of a device, metric and hour that came in a tick. Their sum is that of the ten thousandths and of the others, null where there are none.';

CREATE TABLE device_deltas (
    entries device_entry [] NOT NULL
);
COMMENT ON TABLE device_deltas IS 'Readings that came and are not in device_slots yet.';
-- They are read and gone soon: not worth being compressed.
ALTER TABLE device_deltas ALTER COLUMN entries SET STORAGE EXTERNAL;

-- Hours instead of ten minutes: with a large fleet a slot held a reading or two.
CREATE TEMPORARY TABLE hours ON COMMIT DROP AS
SELECT
    device_id,
    metric_name,
    date_bin('1 hour', slot, '2000-01-01 00:00:00+00') AS slot,
    sum(rows)::bigint AS rows,
    sum(total) AS total,
    min(min) AS min,
    max(max) AS max,
    min(first_seen) AS first_seen,
    max(last_seen) AS last_seen
FROM device_slots
GROUP BY 1, 2, 3;
TRUNCATE device_slots;
-- A fold changes all rows of a page at once, and each finds room for its next version beside it.
ALTER TABLE device_slots SET (fillfactor = 45);
INSERT INTO device_slots (device_id, metric_name, slot, rows, total, min, max, first_seen, last_seen)
SELECT device_id, metric_name, slot, rows, total, min, max, first_seen, last_seen FROM hours;
COMMENT ON TABLE device_slots IS
    'Readings by device, metric and hour of published_at: what is read again when an extreme reading goes away.';
-- squawk-ignore require-concurrent-index-creation
CREATE INDEX device_slots_slot_idx ON device_slots (slot);

UPDATE summary_state SET settled_before = date_bin('1 hour', now() - interval '6 hours', '2000-01-01 00:00:00+00');
INSERT INTO device_metric_totals (device_id, metric_name, rows, total, min, max, first_seen, last_seen)
SELECT device_id, metric_name, sum(rows), sum(total), min(min), max(max), min(first_seen), max(last_seen)
FROM device_slots
WHERE slot < (SELECT settled_before FROM summary_state)
GROUP BY device_id, metric_name;

CREATE VIEW device_pending AS
SELECT
    e.device_id,
    e.metric_name,
    e.slot,
    e.rows,
    CASE
        WHEN e.others IS NULL THEN e.ten_thousandths * 0.0001
        ELSE coalesce(e.ten_thousandths * 0.0001, 0) + e.others
    END AS total,
    e.min,
    e.max,
    e.first_seen,
    e.last_seen
FROM device_deltas AS d
CROSS JOIN LATERAL unnest(d.entries) AS e;
COMMENT ON VIEW device_pending IS 'The entries of device_deltas, one a row.';

CREATE VIEW device_parts AS
SELECT device_id, metric_name, rows, total, min, max, first_seen, last_seen FROM device_metric_totals
UNION ALL
SELECT device_id, metric_name, rows, total, min, max, first_seen, last_seen FROM device_slots
WHERE slot >= (SELECT settled_before FROM summary_state)
UNION ALL
SELECT device_id, metric_name, rows, total, min, max, first_seen, last_seen FROM device_pending;
COMMENT ON VIEW device_parts IS 'What has to be added up for a device and metric: each reading is in one of these rows.';

CREATE VIEW device_metric_summary AS
SELECT
    device_id,
    metric_name,
    sum(rows)::bigint AS rows,
    sum(total) AS total,
    min(min) AS min,
    metric_mean(sum(total), sum(rows)::bigint) AS mean,
    max(max) AS max,
    min(first_seen) AS first_seen,
    max(last_seen) AS last_seen
FROM device_parts
GROUP BY device_id, metric_name;
COMMENT ON VIEW device_metric_summary IS 'Per device and metric: readings, extremes and mean of the value, first and last published_at.';

CREATE VIEW device_summary AS
SELECT device_id, sum(rows)::bigint AS rows, min(first_seen) AS first_seen, max(last_seen) AS last_seen
FROM device_parts
GROUP BY device_id;
COMMENT ON VIEW device_summary IS 'Per device: readings, first and last published_at. Per metric: device_metric_summary.';

GRANT USAGE ON TYPE device_entry TO metrics_summarizer;
GRANT SELECT, INSERT, DELETE ON device_deltas TO metrics_summarizer;
GRANT SELECT, INSERT, UPDATE, DELETE ON device_metric_totals TO metrics_summarizer;
GRANT SELECT ON device_pending, device_parts, device_metric_summary, device_summary TO metrics_summarizer;

-- migrate:down

SET LOCAL lock_timeout = '10s';
SET LOCAL statement_timeout = '5min';

-- The next tick counts anew, since ten minutes cannot be told from an hour.
UPDATE summary_state SET source = NULL;
DROP VIEW device_summary;
DROP VIEW device_metric_summary;
DROP VIEW device_parts;
DROP VIEW device_pending;
DROP TABLE device_deltas;
-- squawk-ignore ban-drop-type
DROP TYPE device_entry;
-- squawk-ignore require-concurrent-index-deletion
DROP INDEX device_slots_slot_idx;
ALTER TABLE device_slots SET (fillfactor = 80);
COMMENT ON TABLE device_slots IS
    'Readings by device, metric and ten minutes of published_at: what is read again when an extreme reading goes away.';

DROP TABLE device_metric_totals;
CREATE TABLE device_metric_summary (
    device_id uuid NOT NULL,
    metric_name smallint NOT NULL,
    rows bigint NOT NULL,
    total numeric NOT NULL,
    min double precision NOT NULL,
    mean double precision NOT NULL GENERATED ALWAYS AS (metric_mean(total, rows)) STORED,
    max double precision NOT NULL,
    first_seen timestamptz NOT NULL,
    last_seen timestamptz NOT NULL,
    CONSTRAINT device_metric_summary_pkey PRIMARY KEY (device_id, metric_name)
) WITH (fillfactor = 50);
COMMENT ON TABLE device_metric_summary IS 'Per device and metric: readings, extremes and mean of the value, first and last published_at.';

CREATE TABLE device_summary (
    device_id uuid NOT NULL CONSTRAINT device_summary_pkey PRIMARY KEY,
    rows bigint NOT NULL,
    first_seen timestamptz NOT NULL,
    last_seen timestamptz NOT NULL
) WITH (fillfactor = 50);
COMMENT ON TABLE device_summary IS 'Per device: readings, first and last published_at. Per metric: device_metric_summary.';
GRANT SELECT, INSERT, UPDATE, DELETE ON device_metric_summary, device_summary TO metrics_summarizer;

-- squawk-ignore ban-drop-column
ALTER TABLE summary_state DROP COLUMN settled_before;
-- squawk-ignore ban-drop-column
ALTER TABLE summary_state DROP COLUMN folded;
-- squawk-ignore ban-drop-column
ALTER TABLE summary_state DROP COLUMN pending;
