-- The table becomes partitioned by published_at without a copy: this file and the next two. Here: from which time on there will be other
-- partitions. Until they are there, a reading that belongs to them waits: whoever stores it is told to try again.

-- migrate:up

SET LOCAL lock_timeout = '10s';
SET LOCAL statement_timeout = '5min';

-- Whoever stores or reads waits behind this for half a second at most: while somebody keeps the table for longer, it is tried again.
-- A vacuum is waited for first, behind which nobody waits; one that is automatic ends for this.
LOCK TABLE metrics IN SHARE UPDATE EXCLUSIVE MODE;
DO $$
DECLARE
    deadline timestamptz := clock_timestamp() + interval '4 minutes';
BEGIN
    LOOP
        BEGIN
            SET LOCAL lock_timeout = '500ms';
            LOCK TABLE metrics IN ACCESS EXCLUSIVE MODE;
            SET LOCAL lock_timeout = '10s';
            EXIT;
        EXCEPTION
            WHEN lock_not_available THEN
                IF clock_timestamp() > deadline THEN
                    RAISE;
                END IF;
                PERFORM pg_sleep(0.5);
        END;
    END LOOP;
END
$$;

CREATE FUNCTION wait_for_partitions() RETURNS trigger
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    -- As if a lock were not free, which every sink waits for: a check alone would make a reject of the record.
    RAISE lock_not_available USING
        MESSAGE = 'readings of this time are stored when the table is partitioned',
        HINT = 'The migration goes on: try again in a moment.';
END
$$;

-- An empty table begins with partitions at once. A table in use goes on for a day or two, so that hardly a reading is beyond.
DO $$
DECLARE
    cutover timestamptz := CASE
        WHEN EXISTS (SELECT FROM metrics) THEN date_trunc('day', now() + interval '49 hours', 'UTC')
        ELSE date_trunc('day', now(), 'UTC')
    END;
BEGIN
    EXECUTE format(
        'ALTER TABLE metrics ADD CONSTRAINT metrics_before_cutover CHECK (published_at < %L) NOT VALID', cutover
    );
    EXECUTE format(
        'CREATE TRIGGER metrics_0_wait BEFORE INSERT ON metrics FOR EACH ROW WHEN (NEW.published_at >= %L) '
        'EXECUTE FUNCTION wait_for_partitions()', cutover
    );
END
$$;

-- migrate:down

SET LOCAL lock_timeout = '10s';
SET LOCAL statement_timeout = '5min';

DROP TRIGGER IF EXISTS metrics_0_wait ON metrics;
-- squawk-ignore ban-drop-constraint
ALTER TABLE metrics DROP CONSTRAINT IF EXISTS metrics_before_cutover;
DROP FUNCTION IF EXISTS wait_for_partitions();
