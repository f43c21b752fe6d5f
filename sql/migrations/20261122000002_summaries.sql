-- Summaries of the readings that cost what is new, not what is there, and are exact all the same.
--
-- Every transaction that changes `metrics` leaves rows in two logs, and these rows become visible with its changes:
--   summary_inserts  one row a statement that inserts: its transaction's now(), which is what created_at defaults to
--   summary_changes  one row a key that was updated, deleted, or inserted with a created_at of its own
-- A tick (metrics_pipeline/summaries.py) reads both logs and the readings they point at in one snapshot, adds what it finds
-- to the tables below, and deletes the log rows it has read. A row's xmin is the (sub)transaction that wrote it, so a reading
-- and its log row are matched by xmin: no clock, no order of commits and no open transaction can make the result wrong.

-- migrate:up

SET LOCAL lock_timeout = '10s';
SET LOCAL statement_timeout = '5min';

CREATE TABLE summary_inserts (
    created_at timestamptz NOT NULL DEFAULT now()
);
COMMENT ON TABLE summary_inserts IS 'Statements that inserted readings and are not yet in the summaries; xmin says which transaction.';

CREATE TABLE summary_changes (
    device_id uuid NOT NULL,
    published_at timestamptz NOT NULL,
    metric_name smallint NOT NULL,
    old_value double precision,
    old_created_at timestamptz,
    old_xmin xid
);
COMMENT ON TABLE summary_changes IS
    'Keys whose reading changed and is not yet in the summaries, with the version that was replaced (null: there was none).';

CREATE TABLE summary_state (
    only_row boolean NOT NULL DEFAULT true CONSTRAINT summary_state_pkey PRIMARY KEY,
    -- Which storage the summaries are of: TRUNCATE, a rewrite or a restore changes it, and the next tick counts anew.
    source text,
    rows bigint NOT NULL,
    absorbed_at timestamptz NOT NULL,
    CONSTRAINT summary_state_has_one_row CHECK (only_row)
);
COMMENT ON TABLE summary_state IS 'How far the summaries are.';

CREATE TABLE ingestion_minutes (
    minute timestamptz NOT NULL CONSTRAINT ingestion_minutes_pkey PRIMARY KEY,
    rows bigint NOT NULL
) WITH (fillfactor = 50);
COMMENT ON TABLE ingestion_minutes IS 'Readings by the minute in which they were stored (created_at); minutes without any are absent.';

CREATE TABLE ingestion_rate (
    minute timestamptz NOT NULL CONSTRAINT ingestion_rate_pkey PRIMARY KEY,
    rows bigint NOT NULL
) WITH (fillfactor = 50);
COMMENT ON TABLE ingestion_rate IS 'Inserts per minute over the last ten minutes, the current one included, at the newest tick.';

-- The digits of a quotient depend on the scale of the dividend, and a sum keeps the scale of what has been taken off again.
-- The least double is 5e-324, and the server refuses to cast what rounds to zero.
CREATE FUNCTION metric_mean(total numeric, rows bigint) RETURNS double precision
LANGUAGE sql IMMUTABLE STRICT PARALLEL SAFE
RETURN CASE
    WHEN abs(trim_scale(total) / rows) < 2.5e-324 THEN 0
    ELSE (trim_scale(total) / rows)::double precision
END;
COMMENT ON FUNCTION metric_mean IS 'Mean of readings whose exact decimal values add up to total.';

CREATE TABLE device_slots (
    device_id uuid NOT NULL,
    metric_name smallint NOT NULL,
    slot timestamptz NOT NULL,
    rows bigint NOT NULL,
    total numeric NOT NULL,
    min double precision NOT NULL,
    max double precision NOT NULL,
    first_seen timestamptz NOT NULL,
    last_seen timestamptz NOT NULL,
    CONSTRAINT device_slots_pkey PRIMARY KEY (device_id, metric_name, slot)
) WITH (fillfactor = 80);
COMMENT ON TABLE device_slots IS
    'Readings by device, metric and ten minutes of published_at: what is read again when an extreme reading goes away.';

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

CREATE FUNCTION metrics_source() RETURNS text
LANGUAGE sql STABLE PARALLEL SAFE
RETURN concat_ws(
    '/',
    (SELECT system_identifier FROM pg_control_system()),
    (SELECT oid FROM pg_database WHERE datname = current_database()),
    'public.metrics'::regclass::oid,
    pg_relation_filenode('public.metrics')
);
COMMENT ON FUNCTION metrics_source IS 'Cluster, database, table and file of the readings.';

CREATE FUNCTION log_inserts() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    INSERT INTO public.summary_inserts DEFAULT VALUES;
    RETURN NULL;
END
$$;

CREATE FUNCTION log_change() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    version xid;
BEGIN
    -- The row is locked by now, so its newest version is the one that goes; OLD does not carry its xmin.
    SELECT m.xmin INTO STRICT version
    FROM public.metrics AS m
    WHERE m.device_id = OLD.device_id AND m.published_at = OLD.published_at AND m.metric_name = OLD.metric_name;
    INSERT INTO public.summary_changes (device_id, published_at, metric_name, old_value, old_created_at, old_xmin)
    VALUES (OLD.device_id, OLD.published_at, OLD.metric_name, OLD.value, OLD.created_at, version);
    RETURN CASE TG_OP WHEN 'DELETE' THEN OLD ELSE NEW END;
END
$$;

CREATE FUNCTION log_key() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    INSERT INTO public.summary_changes (device_id, published_at, metric_name)
    VALUES (NEW.device_id, NEW.published_at, NEW.metric_name);
    RETURN NULL;
END
$$;

-- Triggers of one kind fire in the order of their names. A reading delivered again with equal values makes no new version.
CREATE TRIGGER metrics_1_skip_unchanged BEFORE UPDATE ON metrics
FOR EACH ROW EXECUTE FUNCTION suppress_redundant_updates_trigger();

CREATE TRIGGER metrics_2_log_change BEFORE UPDATE OR DELETE ON metrics
FOR EACH ROW EXECUTE FUNCTION log_change();

CREATE TRIGGER metrics_3_log_new_key AFTER UPDATE ON metrics
FOR EACH ROW WHEN (
    OLD.device_id <> NEW.device_id OR OLD.published_at <> NEW.published_at OR OLD.metric_name <> NEW.metric_name
) EXECUTE FUNCTION log_key();

-- AFTER, because any BEFORE INSERT trigger on rows would keep COPY from writing whole pages at a time.
CREATE TRIGGER metrics_4_log_own_created_at AFTER INSERT ON metrics
FOR EACH ROW WHEN (NEW.created_at <> now()) EXECUTE FUNCTION log_key();

CREATE TRIGGER metrics_5_log_inserts AFTER INSERT ON metrics
FOR EACH STATEMENT EXECUTE FUNCTION log_inserts();

-- Also for what replication or a restore writes.
ALTER TABLE metrics
ENABLE ALWAYS TRIGGER metrics_2_log_change,
ENABLE ALWAYS TRIGGER metrics_3_log_new_key,
ENABLE ALWAYS TRIGGER metrics_4_log_own_created_at,
ENABLE ALWAYS TRIGGER metrics_5_log_inserts;

-- On a table that has readings already, the first tick counts them.
INSERT INTO summary_state (source, rows, absorbed_at)
SELECT CASE WHEN NOT EXISTS (SELECT FROM metrics) THEN metrics_source() END, 0, now();

-- Only the table's owner may do this. It must not wait: whoever waits for the lock ends an autovacuum.
CREATE FUNCTION refresh_created_at_index() RETURNS integer
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    LOCK TABLE public.metrics IN SHARE UPDATE EXCLUSIVE MODE NOWAIT;
    RETURN brin_summarize_new_values('public.metrics_created_at_idx');
EXCEPTION
    WHEN lock_not_available THEN
        RETURN NULL;
END
$$;
COMMENT ON FUNCTION refresh_created_at_index IS
    'Summarize the page ranges filled since the last call; null when a vacuum, which does the same at its end, is at work.';

GRANT SELECT, DELETE ON summary_inserts, summary_changes TO metrics_summarizer;
GRANT SELECT, UPDATE ON summary_state TO metrics_summarizer;
GRANT SELECT, INSERT, UPDATE, DELETE ON
    ingestion_minutes, ingestion_rate, device_slots, device_metric_summary, device_summary TO metrics_summarizer;
GRANT EXECUTE ON FUNCTION metrics_source() TO metrics_summarizer, metrics_reader;
GRANT EXECUTE ON FUNCTION metric_mean(numeric, bigint) TO metrics_summarizer, metrics_reader;
GRANT EXECUTE ON FUNCTION refresh_created_at_index() TO metrics_summarizer;

-- migrate:down

SET LOCAL lock_timeout = '10s';
SET LOCAL statement_timeout = '5min';

DROP TRIGGER metrics_1_skip_unchanged ON metrics;
DROP TRIGGER metrics_2_log_change ON metrics;
DROP TRIGGER metrics_3_log_new_key ON metrics;
DROP TRIGGER metrics_4_log_own_created_at ON metrics;
DROP TRIGGER metrics_5_log_inserts ON metrics;
DROP FUNCTION refresh_created_at_index();
DROP FUNCTION log_key();
DROP FUNCTION log_change();
DROP FUNCTION log_inserts();
DROP FUNCTION metrics_source();
DROP TABLE device_summary;
DROP TABLE device_metric_summary;
DROP TABLE device_slots;
DROP FUNCTION metric_mean(numeric, bigint);
DROP TABLE ingestion_rate;
DROP TABLE ingestion_minutes;
DROP TABLE summary_state;
DROP TABLE summary_changes;
DROP TABLE summary_inserts;
