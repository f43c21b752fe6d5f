-- Readings beyond the cutover go into a table of their own, and the others are proved to lie before it: that reads the table once,
-- beside whoever stores and reads.

-- migrate:up

SET LOCAL lock_timeout = '10s';
SET LOCAL statement_timeout = '12h';

CREATE TABLE metrics_after (LIKE metrics INCLUDING ALL);
-- squawk-ignore ban-drop-constraint
ALTER TABLE metrics_after DROP CONSTRAINT metrics_before_cutover;

DO $$
DECLARE
    beyond text := (
        SELECT replace(pg_get_expr(conbin, conrelid), '<', '>=')
        FROM pg_constraint
        WHERE conrelid = 'metrics'::regclass AND conname = 'metrics_before_cutover'
    );
BEGIN
    EXECUTE format(
        'WITH gone AS (DELETE FROM metrics WHERE %s RETURNING *) INSERT INTO metrics_after SELECT * FROM gone', beyond
    );
END
$$;

ALTER TABLE metrics VALIDATE CONSTRAINT metrics_before_cutover;

-- migrate:down

SET LOCAL lock_timeout = '10s';
SET LOCAL statement_timeout = '5min';

DROP TRIGGER IF EXISTS metrics_0_wait ON metrics;
-- squawk-ignore ban-drop-constraint
ALTER TABLE metrics DROP CONSTRAINT IF EXISTS metrics_before_cutover;
DO $$
BEGIN
    -- The next migration's way back leaves one table only.
    IF to_regclass('metrics_after') IS NOT NULL THEN
        INSERT INTO metrics SELECT * FROM metrics_after;
        -- They came back by another statement, and may have a created_at of before: counted by key.
        INSERT INTO summary_changes (device_id, published_at, metric_name)
        SELECT device_id, published_at, metric_name FROM metrics_after;
        DROP TABLE metrics_after;
    END IF;
END
$$;
