-- What the topic's name stands for: beside offsets stands the log that they are of, and a growth of its partitions is noted.

-- migrate:up

SET LOCAL lock_timeout = '10s';
SET LOCAL statement_timeout = '5min';

CREATE TABLE topic_logs (
    topic text NOT NULL,
    log_id text NOT NULL,
    partitions integer NOT NULL,
    noticed_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    CONSTRAINT topic_logs_pkey PRIMARY KEY (topic, log_id),
    CONSTRAINT topic_logs_have_partitions CHECK (partitions > 0)
);
COMMENT ON TABLE topic_logs IS 'The logs that the topic''s name stood for; the one that was noticed last is the present one.';
COMMENT ON COLUMN topic_logs.log_id IS 'the cluster''s id, a slash, and the topic''s id (nothing when the broker does not tell it)';
COMMENT ON COLUMN topic_logs.partitions IS 'how many there were when it was last looked at: more of them are a growth';

CREATE TABLE topic_growths (
    growth_id bigint GENERATED ALWAYS AS IDENTITY CONSTRAINT topic_growths_pkey PRIMARY KEY,
    topic text NOT NULL,
    log_id text NOT NULL,
    partitions_before integer NOT NULL,
    partitions_after integer NOT NULL,
    noticed_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    due_at timestamptz NOT NULL,
    passed bigint [],
    begins bigint [],
    settled_at timestamptz,
    CONSTRAINT topic_growths_grow CHECK (partitions_after > partitions_before)
);
COMMENT ON TABLE topic_growths IS
    'Partitions that were added: when the sink has passed what came before, it reads again what came after.';
COMMENT ON COLUMN topic_growths.due_at IS 'from when on the ends of the partitions of before may be noted';
COMMENT ON COLUMN topic_growths.passed IS 'by partition of before, the offset that the sink has to have reached; null until it is due';
COMMENT ON COLUMN topic_growths.begins IS 'by partition, the offset from which it is read again; -1: not at all';

ALTER TABLE sink_offsets ADD COLUMN log_id text NOT NULL DEFAULT '';
COMMENT ON COLUMN sink_offsets.log_id IS 'which log the offset is of; nothing when it was written before such notes: then of the first one seen';

ALTER TABLE sink_state ADD COLUMN connector_log text NOT NULL DEFAULT '';
ALTER TABLE sink_state ADD COLUMN connector_held boolean NOT NULL DEFAULT false;
COMMENT ON COLUMN sink_state.connector_log IS 'which log the offsets that the connector committed are of';
COMMENT ON COLUMN sink_state.connector_held IS 'the connector was stopped to move its offsets, and has to go on afterwards';

ALTER TABLE producer_runs ADD COLUMN log_id text NOT NULL DEFAULT '';
COMMENT ON COLUMN producer_runs.log_id IS 'which log the offsets are of; nothing when the run did not know';

ALTER TABLE watcher_offsets ADD COLUMN log_id text NOT NULL DEFAULT '';
COMMENT ON COLUMN watcher_offsets.log_id IS 'which log of the topic the offset is of; nothing when the watcher did not know';

-- Offsets of a former log must not hide those of the present one.
ALTER TABLE rejected_metrics ADD COLUMN log_id text NOT NULL DEFAULT '';
COMMENT ON COLUMN rejected_metrics.log_id IS 'which log the record stands in; nothing when it was written before such notes';
-- squawk-ignore ban-drop-constraint
ALTER TABLE rejected_metrics DROP CONSTRAINT rejected_metrics_pkey;
-- The table is small, and no sink writes while it is altered.
-- squawk-ignore adding-serial-primary-key-field, constraint-missing-not-valid
ALTER TABLE rejected_metrics ADD CONSTRAINT rejected_metrics_pkey PRIMARY KEY (topic, partition, "offset", log_id);

-- Whoever first sees a log says so. What was written before there were such notes is taken to be of the first one.
CREATE FUNCTION note_topic_log(noted_topic text, noted_log text, noted_partitions integer) RETURNS void
LANGUAGE sql SECURITY DEFINER SET search_path = pg_catalog, pg_temp
BEGIN ATOMIC
UPDATE public.rejected_metrics AS r SET log_id = noted_log
WHERE r.topic = noted_topic AND r.log_id = '' AND NOT EXISTS (SELECT FROM public.topic_logs AS t WHERE t.topic = noted_topic);
UPDATE public.producer_runs AS r SET log_id = noted_log
WHERE r.log_id = '' AND NOT EXISTS (SELECT FROM public.topic_logs AS t WHERE t.topic = noted_topic);
-- Places of a former log would stand for other records of the present one.
DELETE FROM public.coerced_metrics AS c
WHERE
    c.topic = noted_topic
    AND EXISTS (SELECT FROM public.topic_logs AS t WHERE t.topic = noted_topic);
INSERT INTO public.topic_logs (topic, log_id, partitions)
VALUES (noted_topic, noted_log, noted_partitions)
ON CONFLICT (topic, log_id) DO UPDATE SET noticed_at = clock_timestamp();
END;
COMMENT ON FUNCTION note_topic_log IS 'This is the log that the topic''s name stands for now.';
REVOKE EXECUTE ON FUNCTION note_topic_log FROM PUBLIC;
GRANT EXECUTE ON FUNCTION note_topic_log TO metrics_writer;

GRANT SELECT ON topic_logs, topic_growths TO metrics_writer, metrics_producer, metrics_summarizer;
GRANT UPDATE (partitions) ON topic_logs TO metrics_writer;
GRANT INSERT, UPDATE ON topic_growths TO metrics_writer;
GRANT UPDATE (connector_log, connector_held) ON sink_state TO metrics_writer;

-- migrate:down

SET LOCAL lock_timeout = '10s';
SET LOCAL statement_timeout = '5min';

DROP FUNCTION note_topic_log;

-- squawk-ignore ban-drop-constraint
ALTER TABLE rejected_metrics DROP CONSTRAINT rejected_metrics_pkey;
DELETE FROM rejected_metrics AS r
USING rejected_metrics AS newer
WHERE
    newer.topic = r.topic AND newer.partition = r.partition AND newer."offset" = r."offset"
    AND (newer.rejected_at, newer.log_id) > (r.rejected_at, r.log_id);
-- squawk-ignore ban-drop-column
ALTER TABLE rejected_metrics DROP COLUMN log_id;
-- squawk-ignore adding-serial-primary-key-field, constraint-missing-not-valid
ALTER TABLE rejected_metrics ADD CONSTRAINT rejected_metrics_pkey PRIMARY KEY (topic, partition, "offset");
-- squawk-ignore ban-drop-column
ALTER TABLE watcher_offsets DROP COLUMN log_id;
-- squawk-ignore ban-drop-column
ALTER TABLE producer_runs DROP COLUMN log_id;
-- squawk-ignore ban-drop-column
ALTER TABLE sink_state DROP COLUMN connector_held;
-- squawk-ignore ban-drop-column
ALTER TABLE sink_state DROP COLUMN connector_log;
-- squawk-ignore ban-drop-column
ALTER TABLE sink_offsets DROP COLUMN log_id;
DROP TABLE topic_growths;
DROP TABLE topic_logs;
