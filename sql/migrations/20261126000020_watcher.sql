-- What the watcher knows: how far it has read, and which records Kafka Connect may have stored in another form than they have.
-- Both move in the transaction that notes the rejects, so a crash leaves nothing out.

-- migrate:up

SET LOCAL lock_timeout = '10s';
SET LOCAL statement_timeout = '5min';

CREATE TABLE watcher_offsets (
    topic text NOT NULL,
    partition integer NOT NULL,
    next_offset bigint NOT NULL,
    waiting bigint NOT NULL DEFAULT 0,
    passed bigint,
    updated_at timestamptz NOT NULL DEFAULT now(),
    CONSTRAINT watcher_offsets_pkey PRIMARY KEY (topic, partition),
    CONSTRAINT watcher_offsets_are_not_negative CHECK (partition >= 0 AND next_offset >= 0 AND waiting >= 0 AND passed >= 0)
) WITH (fillfactor = 50);
COMMENT ON TABLE watcher_offsets IS 'Per partition the first record that the watcher has not looked at, and how many there were behind it.';
COMMENT ON COLUMN watcher_offsets.passed IS 'how far the active sink was then: when it goes back, it stores records once more';

CREATE TABLE coerced_metrics (
    topic text NOT NULL,
    partition integer NOT NULL,
    "offset" bigint NOT NULL,
    device_id uuid NOT NULL,
    published_at timestamptz NOT NULL,
    metric_name smallint NOT NULL,
    value double precision NOT NULL,
    tags text[] NOT NULL,
    looks smallint NOT NULL DEFAULT 0,
    due_at timestamptz NOT NULL DEFAULT now(),
    settled_at timestamptz,
    CONSTRAINT coerced_metrics_pkey PRIMARY KEY (topic, partition, "offset"),
    CONSTRAINT coerced_metrics_looks_are_not_negative CHECK (looks >= 0)
);
COMMENT ON TABLE coerced_metrics IS
    'Rejected records that Kafka Connect stores in another form, with the row that it makes of them: what the watcher puts right.';
COMMENT ON COLUMN coerced_metrics.looks IS 'how often the table was looked at since the sink passed the record';
COMMENT ON COLUMN coerced_metrics.settled_at IS 'when no further look was needed; null while there is one to come';

CREATE INDEX coerced_metrics_due_at_idx ON coerced_metrics (due_at) WHERE settled_at IS NULL;

-- The one way in which a sink's role removes a reading: a row that still is what Connect made of a record that was noted here.
CREATE FUNCTION withdraw_coerced(of_topic text, partitions integer[], offsets bigint[]) RETURNS bigint
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
COMMENT ON FUNCTION withdraw_coerced IS 'Deletes readings that are what Kafka Connect made of these records; returns how many.';

REVOKE EXECUTE ON FUNCTION withdraw_coerced FROM PUBLIC;
GRANT EXECUTE ON FUNCTION withdraw_coerced TO metrics_writer;
GRANT SELECT, INSERT, UPDATE ON watcher_offsets TO metrics_writer;
GRANT SELECT, INSERT, DELETE ON coerced_metrics TO metrics_writer;
GRANT UPDATE (looks, due_at, settled_at) ON coerced_metrics TO metrics_writer;

-- migrate:down

SET LOCAL lock_timeout = '10s';
SET LOCAL statement_timeout = '5min';

DROP FUNCTION withdraw_coerced;
DROP TABLE coerced_metrics;
DROP TABLE watcher_offsets;
