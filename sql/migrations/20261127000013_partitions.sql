-- The table of the readings becomes the first partition of a table of the same name: a change of the catalogue, at any size.
--
-- `metrics_before` takes all that lies before the partitions, `metrics_after` all that lies behind them, so no reading is without a place.
-- metrics_pipeline/partitions.py makes the partitions in between, ahead of time, by cutting them off `metrics_after`.
-- There is no default partition: each new partition would have to be proved against it.

-- migrate:up

SET LOCAL lock_timeout = '10s';
SET LOCAL statement_timeout = '5min';

-- In the order of a tick, so that none of the two waits for the other in a circle.
LOCK TABLE summary_state IN EXCLUSIVE MODE;
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

CREATE TEMPORARY TABLE source_before ON COMMIT DROP AS
SELECT source = metrics_source() AS known FROM summary_state;

DO $$
BEGIN
    IF NOT EXISTS (
        SELECT FROM pg_constraint
        WHERE conrelid = 'metrics'::regclass AND conname = 'metrics_before_cutover' AND convalidated
    ) THEN
        RAISE 'the table is not prepared' USING HINT = 'Roll back 20261127000011, too: it begins with that one.';
    END IF;
END
$$;

DROP TRIGGER metrics_0_wait ON metrics;
DROP TRIGGER metrics_1_skip_unchanged ON metrics;
DROP TRIGGER metrics_2_log_change ON metrics;
DROP TRIGGER metrics_3_log_new_key ON metrics;
DROP TRIGGER metrics_4_log_own_created_at ON metrics;
DROP TRIGGER metrics_5_log_inserts ON metrics;
DROP FUNCTION wait_for_partitions();

-- squawk-ignore renaming-table
ALTER TABLE metrics RENAME TO metrics_before;
-- squawk-ignore renaming-object
ALTER INDEX metrics_pkey RENAME TO metrics_before_pkey;
-- squawk-ignore renaming-object
ALTER INDEX metrics_created_at_idx RENAME TO metrics_before_created_at_idx;
REVOKE ALL ON metrics_before FROM metrics_writer, metrics_summarizer, metrics_producer;

CREATE TABLE metrics (
    device_id uuid NOT NULL,
    published_at timestamptz NOT NULL,
    metric_name smallint NOT NULL,
    value double precision NOT NULL,
    tags text [] NOT NULL DEFAULT '{}',
    created_at timestamptz NOT NULL DEFAULT now(),
    CONSTRAINT metrics_pkey PRIMARY KEY (device_id, published_at, metric_name)
) PARTITION BY RANGE (published_at);
COMMENT ON TABLE metrics IS 'Sensor readings, each key once. Partitions by published_at.';
COMMENT ON COLUMN metrics.published_at IS 'when the device took the reading';
COMMENT ON COLUMN metrics.created_at IS 'start of the transaction that first stored the key; an upsert leaves it';
-- squawk-ignore require-concurrent-index-creation
CREATE INDEX metrics_created_at_idx ON metrics USING brin (created_at) WITH (autosummarize = off);
GRANT SELECT, UPDATE ON metrics TO metrics_writer;
GRANT INSERT (device_id, published_at, metric_name, value, tags) ON metrics TO metrics_writer;
GRANT SELECT ON metrics TO metrics_summarizer, metrics_producer;

-- The checks as they are by now: a metric may have been added.
DO $$
DECLARE
    known record;
    cutover text := (
        SELECT substring(pg_get_expr(conbin, conrelid) FROM '''([^'']+)''')
        FROM pg_constraint
        WHERE conrelid = 'metrics_before'::regclass AND conname = 'metrics_before_cutover'
    );
BEGIN
    FOR known IN
        SELECT conname, pg_get_constraintdef(oid) AS definition
        FROM pg_constraint
        WHERE conrelid = 'metrics_before'::regclass AND contype = 'c' AND conname <> 'metrics_before_cutover'
    LOOP
        EXECUTE format('ALTER TABLE metrics ADD CONSTRAINT %I %s', known.conname, known.definition);
    END LOOP;
    EXECUTE format('ALTER TABLE metrics ATTACH PARTITION metrics_before FOR VALUES FROM (MINVALUE) TO (%L)', cutover);
    EXECUTE format('ALTER TABLE metrics ATTACH PARTITION metrics_after FOR VALUES FROM (%L) TO (MAXVALUE)', cutover);
END
$$;
-- squawk-ignore ban-drop-constraint
ALTER TABLE metrics_before DROP CONSTRAINT metrics_before_cutover;
COMMENT ON TABLE metrics_before IS 'Readings before the partitions of metrics.';
COMMENT ON TABLE metrics_after IS 'Readings behind the partitions of metrics: the next partitions are cut off it.';
-- It holds only what is ahead of time, and is asked for what lies in the partition that is cut off.
-- squawk-ignore require-concurrent-index-creation
CREATE INDEX metrics_after_published_at_idx ON metrics_after (published_at);

-- An UPDATE that moves a reading into another partition fires no AFTER UPDATE trigger, so the new key is logged here, too.
CREATE OR REPLACE FUNCTION log_change() RETURNS trigger
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
    IF TG_OP = 'DELETE' THEN
        RETURN OLD;
    END IF;
    IF (NEW.device_id, NEW.published_at, NEW.metric_name) <> (OLD.device_id, OLD.published_at, OLD.metric_name) THEN
        INSERT INTO public.summary_changes (device_id, published_at, metric_name)
        VALUES (NEW.device_id, NEW.published_at, NEW.metric_name);
    END IF;
    RETURN NEW;
END
$$;

CREATE TRIGGER metrics_1_skip_unchanged BEFORE UPDATE ON metrics
FOR EACH ROW EXECUTE FUNCTION suppress_redundant_updates_trigger();

CREATE TRIGGER metrics_2_log_change BEFORE UPDATE OR DELETE ON metrics
FOR EACH ROW EXECUTE FUNCTION log_change();

CREATE TRIGGER metrics_4_log_own_created_at AFTER INSERT ON metrics
FOR EACH ROW WHEN (NEW.created_at <> now()) EXECUTE FUNCTION log_key();

-- A transition table here would keep COPY from writing whole pages at a time, as a BEFORE INSERT trigger would.
CREATE TRIGGER metrics_5_log_inserts AFTER INSERT ON metrics
FOR EACH STATEMENT EXECUTE FUNCTION log_inserts();

ALTER TABLE metrics
ENABLE ALWAYS TRIGGER metrics_2_log_change,
ENABLE ALWAYS TRIGGER metrics_4_log_own_created_at,
ENABLE ALWAYS TRIGGER metrics_5_log_inserts;

-- While a large partition is split, its changes are noted by a trigger that only it has then: metrics_pipeline/partitions.py.
CREATE TABLE split_changes (
    device_id uuid NOT NULL,
    published_at timestamptz NOT NULL,
    metric_name smallint NOT NULL
);
COMMENT ON TABLE split_changes IS 'Keys of readings that were changed in a partition which is being split.';

CREATE FUNCTION note_split_change() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    IF TG_OP <> 'INSERT' THEN
        INSERT INTO public.split_changes (device_id, published_at, metric_name)
        VALUES (OLD.device_id, OLD.published_at, OLD.metric_name);
    END IF;
    IF TG_OP <> 'DELETE' THEN
        INSERT INTO public.split_changes (device_id, published_at, metric_name)
        VALUES (NEW.device_id, NEW.published_at, NEW.metric_name);
    END IF;
    RETURN NULL;
END
$$;

-- Those that went beyond the cutover came back by another statement: counted by key.
INSERT INTO summary_changes (device_id, published_at, metric_name)
SELECT device_id, published_at, metric_name FROM metrics_after;

CREATE OR REPLACE FUNCTION metrics_source() RETURNS text
LANGUAGE sql STABLE PARALLEL SAFE
RETURN concat_ws(
    '/',
    (SELECT system_identifier FROM pg_control_system()),
    (SELECT oid FROM pg_database WHERE datname = current_database()),
    'public.metrics'::regclass::oid,
    (
        SELECT md5(string_agg(relid::oid || ':' || pg_relation_filenode(relid), ',' ORDER BY relid::oid))
        FROM pg_partition_tree('public.metrics')
        WHERE isleaf
    )
);
COMMENT ON FUNCTION metrics_source IS
    'Cluster, database, table and files of the readings. Who makes or drops a partition notes the new one in summary_state.';

UPDATE summary_state SET source = metrics_source() WHERE (SELECT known FROM source_before);

CREATE OR REPLACE FUNCTION refresh_created_at_index() RETURNS integer
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    leaf regclass;
    summarized integer := 0;
    busy boolean := false;
BEGIN
    FOR leaf IN SELECT i.relid FROM pg_partition_tree('public.metrics_created_at_idx') AS i WHERE i.isleaf LOOP
        BEGIN
            EXECUTE format(
                'LOCK TABLE %s IN SHARE UPDATE EXCLUSIVE MODE NOWAIT',
                (SELECT x.indrelid::regclass FROM pg_index AS x WHERE x.indexrelid = leaf)
            );
            summarized := summarized + brin_summarize_new_values(leaf);
        EXCEPTION
            WHEN lock_not_available THEN
                busy := true;
        END;
    END LOOP;
    RETURN CASE WHEN NOT busy THEN summarized END;
END
$$;

CREATE OR REPLACE FUNCTION withdraw_coerced(of_topic text, partitions integer [], offsets bigint []) RETURNS bigint
LANGUAGE sql SECURITY DEFINER SET search_path = pg_catalog, pg_temp
BEGIN ATOMIC
WITH gone AS (
    DELETE FROM public.metrics AS m
    USING public.coerced_metrics AS c, unnest(partitions, offsets) AS p (partition, "offset")
    WHERE
        c.topic = of_topic AND c.partition = p.partition AND c."offset" = p."offset" AND c.settled_at IS NULL
        AND m.device_id = c.device_id AND m.published_at = c.published_at AND m.metric_name = c.metric_name
        AND m.value = c.value AND m.tags = c.tags
    RETURNING 1
)
SELECT count(*) FROM gone;
END;

-- migrate:down

-- The readings of the partitions are copied into one table: this takes its time, and nobody reads or stores meanwhile.
SET LOCAL lock_timeout = '10s';
SET LOCAL statement_timeout = '12h';

LOCK TABLE summary_state IN EXCLUSIVE MODE;
LOCK TABLE metrics IN ACCESS EXCLUSIVE MODE;

DROP TRIGGER metrics_1_skip_unchanged ON metrics;
DROP TRIGGER metrics_2_log_change ON metrics;
DROP TRIGGER metrics_4_log_own_created_at ON metrics;
DROP TRIGGER metrics_5_log_inserts ON metrics;

-- squawk-ignore require-concurrent-partition-detach
ALTER TABLE metrics DETACH PARTITION metrics_before;
INSERT INTO metrics_before SELECT * FROM metrics;

-- What refers to the table by its number.
CREATE OR REPLACE FUNCTION metrics_source() RETURNS text
LANGUAGE sql STABLE PARALLEL SAFE
RETURN NULL::text;
CREATE OR REPLACE FUNCTION withdraw_coerced(of_topic text, partitions integer [], offsets bigint []) RETURNS bigint
LANGUAGE sql SECURITY DEFINER SET search_path = pg_catalog, pg_temp
BEGIN ATOMIC
SELECT 0::bigint;
END;
DROP TABLE metrics;
-- What an interrupted split left.
DROP TABLE IF EXISTS metrics_split;
DROP FUNCTION note_split_change();
DROP TABLE split_changes;
-- squawk-ignore renaming-table
ALTER TABLE metrics_before RENAME TO metrics;
-- squawk-ignore renaming-object
ALTER INDEX metrics_before_pkey RENAME TO metrics_pkey;
-- squawk-ignore renaming-object
ALTER INDEX metrics_before_created_at_idx RENAME TO metrics_created_at_idx;
COMMENT ON TABLE metrics IS 'Sensor readings, each key once.';
GRANT SELECT, UPDATE ON metrics TO metrics_writer;
GRANT INSERT (device_id, published_at, metric_name, value, tags) ON metrics TO metrics_writer;
GRANT SELECT ON metrics TO metrics_summarizer, metrics_producer;

CREATE OR REPLACE FUNCTION log_change() RETURNS trigger
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
CREATE TRIGGER metrics_1_skip_unchanged BEFORE UPDATE ON metrics
FOR EACH ROW EXECUTE FUNCTION suppress_redundant_updates_trigger();
CREATE TRIGGER metrics_2_log_change BEFORE UPDATE OR DELETE ON metrics
FOR EACH ROW EXECUTE FUNCTION log_change();
CREATE TRIGGER metrics_3_log_new_key AFTER UPDATE ON metrics
FOR EACH ROW WHEN (
    OLD.device_id <> NEW.device_id OR OLD.published_at <> NEW.published_at OR OLD.metric_name <> NEW.metric_name
) EXECUTE FUNCTION log_key();
CREATE TRIGGER metrics_4_log_own_created_at AFTER INSERT ON metrics
FOR EACH ROW WHEN (NEW.created_at <> now()) EXECUTE FUNCTION log_key();
CREATE TRIGGER metrics_5_log_inserts AFTER INSERT ON metrics
FOR EACH STATEMENT EXECUTE FUNCTION log_inserts();
ALTER TABLE metrics
ENABLE ALWAYS TRIGGER metrics_2_log_change,
ENABLE ALWAYS TRIGGER metrics_3_log_new_key,
ENABLE ALWAYS TRIGGER metrics_4_log_own_created_at,
ENABLE ALWAYS TRIGGER metrics_5_log_inserts;

CREATE OR REPLACE FUNCTION metrics_source() RETURNS text
LANGUAGE sql STABLE PARALLEL SAFE
RETURN concat_ws(
    '/',
    (SELECT system_identifier FROM pg_control_system()),
    (SELECT oid FROM pg_database WHERE datname = current_database()),
    'public.metrics'::regclass::oid,
    pg_relation_filenode('public.metrics')
);
COMMENT ON FUNCTION metrics_source IS 'Cluster, database, table and file of the readings.';

CREATE OR REPLACE FUNCTION refresh_created_at_index() RETURNS integer
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    LOCK TABLE public.metrics IN SHARE UPDATE EXCLUSIVE MODE NOWAIT;
    RETURN brin_summarize_new_values('public.metrics_created_at_idx');
EXCEPTION
    WHEN lock_not_available THEN
        RETURN NULL;
END
$$;

CREATE OR REPLACE FUNCTION withdraw_coerced(of_topic text, partitions integer [], offsets bigint []) RETURNS bigint
LANGUAGE sql SECURITY DEFINER SET search_path = pg_catalog, pg_temp
BEGIN ATOMIC
WITH gone AS (
    DELETE FROM public.metrics AS m
    USING public.coerced_metrics AS c, unnest(partitions, offsets) AS p (partition, "offset")
    WHERE
        c.topic = of_topic AND c.partition = p.partition AND c."offset" = p."offset" AND c.settled_at IS NULL
        AND m.device_id = c.device_id AND m.published_at = c.published_at AND m.metric_name = c.metric_name
        AND m.value = c.value AND m.tags = c.tags
    RETURNING 1
)
SELECT count(*) FROM gone;
END;
-- The next tick counts anew: what was copied has other versions.
UPDATE summary_state SET source = NULL;
