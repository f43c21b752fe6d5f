-- Partitions whose readings are old are dropped whole, and the summaries go with them: metrics_pipeline/retention.py does it.
--
-- What a partition contributes to `device_slots` is known by its bounds, since slots do not cross them. By created_at it has to be
-- counted: that is done beforehand (`partition_minutes`), and what changes in the partition afterwards is noted by a trigger of its own
-- (`late_changes`), with its transaction. So the count can be told for the very snapshot that the summaries are of.

-- migrate:up

SET LOCAL lock_timeout = '10s';
SET LOCAL statement_timeout = '5min';

ALTER TABLE summary_state ADD COLUMN snapshot pg_snapshot;
COMMENT ON COLUMN summary_state.snapshot IS 'what the summaries are of: the transactions that they contain';

-- A tick sees one state of the readings, and says at its end that it was one.
CREATE FUNCTION note_snapshot() RETURNS trigger
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    NEW.snapshot := pg_current_snapshot();
    RETURN NEW;
END
$$;
CREATE TRIGGER summary_state_note_snapshot BEFORE UPDATE OF absorbed_at ON summary_state
FOR EACH ROW EXECUTE FUNCTION note_snapshot();

CREATE TABLE partition_minutes (
    partition text NOT NULL,
    -- The storage that was counted, and by whom: the summaries have to be of a later snapshot.
    file oid NOT NULL,
    counted_by xid8 NOT NULL DEFAULT pg_current_xact_id(),
    minute timestamptz NOT NULL,
    rows bigint NOT NULL,
    CONSTRAINT partition_minutes_pkey PRIMARY KEY (partition, minute)
);
COMMENT ON TABLE partition_minutes IS 'Readings of a partition that is about to go, by the minute in which they were stored (created_at).';

CREATE TABLE late_changes (
    partition text NOT NULL,
    changed_by xid8 NOT NULL DEFAULT pg_current_xact_id(),
    device_id uuid NOT NULL,
    published_at timestamptz NOT NULL,
    metric_name smallint NOT NULL,
    minute timestamptz NOT NULL,
    rows bigint NOT NULL
);
COMMENT ON TABLE late_changes IS 'What came to a partition that is about to go (1), and what went (-1), with the minute of created_at.';

CREATE FUNCTION note_late_change() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    IF TG_OP <> 'INSERT' THEN
        INSERT INTO public.late_changes (partition, device_id, published_at, metric_name, minute, rows)
        VALUES (
            TG_TABLE_NAME, OLD.device_id, OLD.published_at, OLD.metric_name,
            date_bin('1 minute', OLD.created_at, '2000-01-01 00:00:00+00'), -1
        );
    END IF;
    IF TG_OP <> 'DELETE' THEN
        INSERT INTO public.late_changes (partition, device_id, published_at, metric_name, minute, rows)
        VALUES (
            TG_TABLE_NAME, NEW.device_id, NEW.published_at, NEW.metric_name,
            date_bin('1 minute', NEW.created_at, '2000-01-01 00:00:00+00'), 1
        );
    END IF;
    RETURN NULL;
END
$$;

CREATE TABLE detached_partitions (
    number bigint GENERATED ALWAYS AS IDENTITY CONSTRAINT detached_partitions_pkey PRIMARY KEY,
    partition text NOT NULL,
    low timestamptz,
    high timestamptz NOT NULL,
    rows bigint NOT NULL,
    bytes bigint NOT NULL,
    detached_at timestamptz NOT NULL DEFAULT now(),
    dropped_at timestamptz
);
COMMENT ON TABLE detached_partitions IS
    'Partitions that retention took out of metrics. Until dropped_at is set, each is the table metrics_detached_NUMBER.';

CREATE TABLE restored_partitions (
    partition text NOT NULL CONSTRAINT restored_partitions_pkey PRIMARY KEY,
    restored_at timestamptz NOT NULL DEFAULT now()
);
COMMENT ON TABLE restored_partitions IS 'Partitions into which old readings were brought back: retention leaves them alone for a while.';

CREATE TABLE retention_state (
    only_row boolean NOT NULL DEFAULT true CONSTRAINT retention_state_pkey PRIMARY KEY,
    retained_from timestamptz,
    CONSTRAINT retention_state_has_one_row CHECK (only_row)
);
COMMENT ON TABLE retention_state IS 'How far retention is.';
COMMENT ON COLUMN retention_state.retained_from IS 'readings with an earlier published_at have been dropped; null: none has';
INSERT INTO retention_state DEFAULT VALUES;

-- migrate:down

SET LOCAL lock_timeout = '10s';
SET LOCAL statement_timeout = '5min';

DO $$
DECLARE
    of regclass;
BEGIN
    IF EXISTS (SELECT FROM detached_partitions WHERE dropped_at IS NULL) THEN
        RAISE 'a partition is detached and not dropped yet' USING HINT = 'Run the job `partitions` first.';
    END IF;
    FOR of IN
        SELECT tgrelid FROM pg_trigger WHERE tgname = 'metrics_9_note_late_change' AND tgfoid = 'note_late_change'::regproc
    LOOP
        EXECUTE format('DROP TRIGGER metrics_9_note_late_change ON %s', of);
    END LOOP;
END
$$;
-- What an interrupted run left: it is true now, and would not be of a table without partitions.
-- squawk-ignore ban-drop-constraint
ALTER TABLE metrics_before DROP CONSTRAINT IF EXISTS metrics_bound;
DROP TABLE retention_state;
DROP TABLE restored_partitions;
DROP TABLE detached_partitions;
DROP FUNCTION note_late_change();
DROP TABLE late_changes;
DROP TABLE partition_minutes;
DROP TRIGGER summary_state_note_snapshot ON summary_state;
DROP FUNCTION note_snapshot();
-- squawk-ignore ban-drop-column
ALTER TABLE summary_state DROP COLUMN snapshot;
