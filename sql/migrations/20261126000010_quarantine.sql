-- The quarantine: what the repair stored and rejected in the connector's place, and that it is the one who stopped the connector.

-- migrate:up

SET LOCAL lock_timeout = '10s';
SET LOCAL statement_timeout = '5min';

CREATE TABLE quarantines (
    number bigint GENERATED ALWAYS AS IDENTITY CONSTRAINT quarantines_pkey PRIMARY KEY,
    topic text NOT NULL,
    log_id text NOT NULL,
    cause text NOT NULL,
    records bigint NOT NULL,
    begun_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    ended_at timestamptz,
    CONSTRAINT quarantines_take_records CHECK (records > 0)
);
COMMENT ON TABLE quarantines IS
'Stretches of the topic that were stored and rejected in the connector''s place, because it could not pass them.';
COMMENT ON COLUMN quarantines.log_id IS 'which log the topic''s name stood for';
COMMENT ON COLUMN quarantines.cause IS 'why the connector could not';
COMMENT ON COLUMN quarantines.records IS 'how many of each partition were to be taken; more when quarantines follow each other closely';
COMMENT ON COLUMN quarantines.ended_at IS 'when the connector was let go on; null while the quarantine has it stopped';
CREATE UNIQUE INDEX quarantines_one_at_a_time ON quarantines (topic) WHERE ended_at IS NULL;

CREATE TABLE quarantined_stretches (
    quarantine bigint NOT NULL,
    partition integer NOT NULL,
    first_offset bigint NOT NULL,
    next_offset bigint NOT NULL,
    stored bigint NOT NULL,
    rejected bigint NOT NULL,
    CONSTRAINT quarantined_stretches_pkey PRIMARY KEY (quarantine, partition),
    CONSTRAINT quarantined_stretches_of FOREIGN KEY (quarantine) REFERENCES quarantines (number) ON DELETE CASCADE,
    CONSTRAINT quarantined_stretches_go_forward CHECK (partition >= 0 AND first_offset >= 0 AND next_offset >= first_offset)
);
COMMENT ON TABLE quarantined_stretches IS
'How far a quarantine is in each partition: noted in the transaction that stores and rejects the records before `next_offset`.';

COMMENT ON TABLE rejected_metrics IS 'Records that could not be stored, whole, with where they came from and why.';

GRANT SELECT, INSERT, UPDATE, DELETE ON quarantines, quarantined_stretches TO metrics_writer;
GRANT SELECT ON quarantines, quarantined_stretches TO metrics_summarizer, metrics_producer;

-- migrate:down

SET LOCAL lock_timeout = '10s';
SET LOCAL statement_timeout = '5min';

COMMENT ON TABLE rejected_metrics IS 'Records that the COPY sink could not store, whole, with where they came from and why.';
DROP TABLE quarantined_stretches;
DROP TABLE quarantines;
