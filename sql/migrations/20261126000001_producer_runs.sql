-- The ledger: whoever produces may say by which way, what is asked has an index, and runs that are over can go.

-- migrate:up

SET LOCAL lock_timeout = '10s';
SET LOCAL statement_timeout = '5min';

-- squawk-ignore ban-drop-constraint
ALTER TABLE producer_runs DROP CONSTRAINT producer_runs_source_is_known;
COMMENT ON COLUMN producer_runs.source IS 'by which way the readings came: simulated, replay, or a word of your own';

-- "Did a run report just now?" is asked every few seconds; by the time at which it began nobody asks.
-- squawk-ignore require-concurrent-index-deletion
DROP INDEX producer_runs_started_at_idx;
-- squawk-ignore require-concurrent-index-creation
CREATE INDEX producer_runs_updated_at_idx ON producer_runs (updated_at);

-- migrate:down

SET LOCAL lock_timeout = '10s';
SET LOCAL statement_timeout = '5min';

-- squawk-ignore require-concurrent-index-deletion
DROP INDEX producer_runs_updated_at_idx;
-- squawk-ignore require-concurrent-index-creation
CREATE INDEX producer_runs_started_at_idx ON producer_runs (started_at);

UPDATE producer_runs SET source = 'replay' WHERE source NOT IN ('simulated', 'replay');
ALTER TABLE producer_runs ADD CONSTRAINT producer_runs_source_is_known
CHECK (source IN ('simulated', 'replay')) NOT VALID;
