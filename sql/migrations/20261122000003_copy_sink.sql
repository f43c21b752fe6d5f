-- What the COPY sink knows: how far it is, what it refused, and whether it is the one that writes.
-- Offsets move in the transaction that stores the rows, so a crash, a replay or a zombie can neither lose nor double one.

-- migrate:up

SET LOCAL lock_timeout = '10s';
SET LOCAL statement_timeout = '5min';

CREATE TABLE sink_state (
    only_row boolean NOT NULL DEFAULT true CONSTRAINT sink_state_pkey PRIMARY KEY,
    active text NOT NULL DEFAULT 'connect',
    changed_at timestamptz NOT NULL DEFAULT now(),
    CONSTRAINT sink_state_has_one_row CHECK (only_row),
    CONSTRAINT sink_state_active_is_known CHECK (active IN ('connect', 'copy'))
);
COMMENT ON TABLE sink_state IS 'Which sink stores the readings: set by provisioning, obeyed by the COPY sink in each transaction.';

INSERT INTO sink_state DEFAULT VALUES;

CREATE TABLE sink_offsets (
    topic text NOT NULL,
    partition integer NOT NULL,
    next_offset bigint NOT NULL,
    updated_at timestamptz NOT NULL DEFAULT now(),
    CONSTRAINT sink_offsets_pkey PRIMARY KEY (topic, partition),
    CONSTRAINT sink_offsets_are_not_negative CHECK (partition >= 0 AND next_offset >= 0)
) WITH (fillfactor = 50);
COMMENT ON TABLE sink_offsets IS 'Per partition the offset of the first record that the COPY sink has not stored or rejected.';

CREATE TABLE rejected_metrics (
    topic text NOT NULL,
    partition integer NOT NULL,
    "offset" bigint NOT NULL,
    reason text NOT NULL,
    detail text NOT NULL,
    key bytea,
    payload bytea,
    rejected_at timestamptz NOT NULL DEFAULT now(),
    replayed_at timestamptz,
    CONSTRAINT rejected_metrics_pkey PRIMARY KEY (topic, partition, "offset")
);
COMMENT ON TABLE rejected_metrics IS 'Records that the COPY sink could not store, whole, with where they came from and why.';
COMMENT ON COLUMN rejected_metrics.reason IS 'a code, such as bad_value: metrics_pipeline/metric.py says what each means';
COMMENT ON COLUMN rejected_metrics.replayed_at IS 'when the record was published again; null while it waits';

GRANT SELECT ON sink_state TO metrics_writer, metrics_summarizer, metrics_producer;
GRANT SELECT, INSERT, UPDATE ON sink_offsets TO metrics_writer;
GRANT SELECT ON sink_offsets TO metrics_summarizer, metrics_producer;
GRANT SELECT, INSERT ON rejected_metrics TO metrics_writer;
GRANT UPDATE (reason, detail, key, payload, rejected_at, replayed_at) ON rejected_metrics TO metrics_writer;

-- migrate:down

SET LOCAL lock_timeout = '10s';
SET LOCAL statement_timeout = '5min';

DROP TABLE rejected_metrics;
DROP TABLE sink_offsets;
DROP TABLE sink_state;
