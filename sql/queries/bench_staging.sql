-- A table without an index that rows are appended to before they are moved into metrics, with the same checks, and how far that is.
-- Two tables take turns, so that one is emptied as a whole while the other one fills. `arrival` orders what has the same key: a row gets
-- it while its writer holds the offsets of the record's partition.
CREATE TABLE staged_metrics (
    LIKE metrics INCLUDING CONSTRAINTS,
    arrival bigint NOT NULL GENERATED ALWAYS AS IDENTITY
) WITH (autovacuum_enabled = off);
ALTER TABLE staged_metrics DROP COLUMN created_at;
CREATE TABLE moving_metrics (
    LIKE metrics INCLUDING CONSTRAINTS,
    arrival bigint NOT NULL GENERATED ALWAYS AS IDENTITY
) WITH (autovacuum_enabled = off);
ALTER TABLE moving_metrics DROP COLUMN created_at;
GRANT INSERT (device_id, published_at, metric_name, value, tags) ON staged_metrics, moving_metrics TO metrics_writer;
CREATE TABLE staging_state (waiting bigint NOT NULL, moved bigint NOT NULL, most_bytes bigint NOT NULL);
COMMENT ON COLUMN staging_state.waiting IS 'sum of the offsets whose rows stand in moving_metrics or metrics';
COMMENT ON COLUMN staging_state.moved IS 'sum of the offsets whose rows stand in metrics';
COMMENT ON COLUMN staging_state.most_bytes IS 'of the largest table that was moved';
INSERT INTO staging_state VALUES (0, 0, 0)
