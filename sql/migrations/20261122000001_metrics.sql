-- The readings, what their codes mean, and who may do what.
-- Roles come from the cluster's bootstrap (metrics_pipeline/postgres.py); migrations only grant.

-- migrate:up

SET LOCAL lock_timeout = '10s';
SET LOCAL statement_timeout = '5min';

REVOKE ALL ON SCHEMA public FROM PUBLIC;
GRANT USAGE ON SCHEMA public TO metrics_writer, metrics_summarizer, metrics_reader, metrics_producer;
ALTER DEFAULT PRIVILEGES REVOKE EXECUTE ON FUNCTIONS FROM PUBLIC;
-- Whatever later migrations add can be read by the one role that only reads.
ALTER DEFAULT PRIVILEGES IN SCHEMA public GRANT SELECT ON TABLES TO metrics_reader;

CREATE TABLE metric_names (
    code smallint CONSTRAINT metric_names_pkey PRIMARY KEY,
    name text NOT NULL CONSTRAINT metric_names_name_key UNIQUE,
    unit text NOT NULL
);
COMMENT ON TABLE metric_names IS 'What the codes in metrics.metric_name mean, and in which unit the values are.';

INSERT INTO metric_names (code, name, unit)
VALUES
    (0, 'temperature', '°C'),
    (10, 'humidity', '%'),
    (20, 'pressure', 'hPa'),
    (30, 'co2', 'ppm'),
    (40, 'light', 'lx'),
    (50, 'sound', 'dB');

CREATE TABLE metrics (
    device_id uuid NOT NULL,
    published_at timestamptz NOT NULL,
    metric_name smallint NOT NULL,
    value double precision NOT NULL,
    tags text[] NOT NULL DEFAULT '{}',
    created_at timestamptz NOT NULL DEFAULT now(),
    CONSTRAINT metrics_pkey PRIMARY KEY (device_id, published_at, metric_name),
    -- A foreign key to metric_names would cost a lookup a row.
    CONSTRAINT metrics_metric_name_is_known CHECK (metric_name IN (0, 10, 20, 30, 40, 50)),
    -- NaN sorts above Infinity, so the upper bound refuses it too.
    CONSTRAINT metrics_value_is_finite CHECK (value > '-Infinity' AND value < 'Infinity'),
    -- The years of the wire format, and the only ones that every client can read.
    CONSTRAINT metrics_published_at_has_four_digit_year CHECK (
        published_at >= '0001-01-01 00:00:00+00' AND published_at < '10000-01-01 00:00:00+00'
    ),
    CONSTRAINT metrics_created_at_has_four_digit_year CHECK (
        created_at >= '0001-01-01 00:00:00+00' AND created_at < '10000-01-01 00:00:00+00'
    )
);
COMMENT ON TABLE metrics IS 'Sensor readings, each key once.';
COMMENT ON COLUMN metrics.published_at IS 'when the device took the reading';
COMMENT ON COLUMN metrics.created_at IS 'start of the transaction that first stored the key; an upsert leaves it';

-- Rows arrive nearly in this order, and a B-tree would cost every insert.
-- The summaries keep it up to date: autosummarize drops requests when more than 256 page ranges fill within a minute.
CREATE INDEX metrics_created_at_idx ON metrics USING brin (created_at) WITH (autosummarize = off);

-- Not created_at: a sink can not choose when a row was stored.
GRANT SELECT, UPDATE ON metrics TO metrics_writer;
GRANT INSERT (device_id, published_at, metric_name, value, tags) ON metrics TO metrics_writer;
GRANT SELECT ON metrics, metric_names TO metrics_summarizer, metrics_producer;
GRANT SELECT ON metric_names TO metrics_writer;

CREATE TABLE producer_runs (
    run_id uuid NOT NULL,
    partition integer NOT NULL,
    source text NOT NULL,
    state text NOT NULL,
    acknowledged bigint NOT NULL DEFAULT 0,
    failed bigint NOT NULL DEFAULT 0,
    unknown bigint NOT NULL DEFAULT 0,
    offsets int8multirange NOT NULL DEFAULT '{}',
    started_at timestamptz NOT NULL,
    updated_at timestamptz NOT NULL,
    CONSTRAINT producer_runs_pkey PRIMARY KEY (run_id, partition),
    CONSTRAINT producer_runs_partition_is_known CHECK (partition >= -1),
    CONSTRAINT producer_runs_source_is_known CHECK (source IN ('simulated', 'replay')),
    CONSTRAINT producer_runs_state_is_known CHECK (state IN ('running', 'finished', 'stopped', 'failed')),
    CONSTRAINT producer_runs_counts_are_not_negative CHECK (acknowledged >= 0 AND failed >= 0 AND unknown >= 0)
);
COMMENT ON TABLE producer_runs IS
    'What the broker promised each producer run, by partition; -1 holds failed and unknown records without a partition.';
COMMENT ON COLUMN producer_runs.offsets IS 'offsets that the broker acknowledged, exactly';

-- The newest runs first, for the status page and for what verify reads.
CREATE INDEX producer_runs_started_at_idx ON producer_runs (started_at);

GRANT SELECT, INSERT, UPDATE ON producer_runs TO metrics_producer;
GRANT SELECT ON producer_runs TO metrics_summarizer;

-- migrate:down

SET LOCAL lock_timeout = '10s';
SET LOCAL statement_timeout = '5min';

DROP TABLE producer_runs;
DROP TABLE metrics;
DROP TABLE metric_names;
ALTER DEFAULT PRIVILEGES IN SCHEMA public REVOKE SELECT ON TABLES FROM metrics_reader;
ALTER DEFAULT PRIVILEGES GRANT EXECUTE ON FUNCTIONS TO PUBLIC;
REVOKE USAGE ON SCHEMA public FROM metrics_writer, metrics_summarizer, metrics_reader, metrics_producer;
GRANT USAGE ON SCHEMA public TO PUBLIC;
