-- A log that is restored from a snapshot keeps its id: beside the offset stands when the record before it was appended.

-- migrate:up

SET LOCAL lock_timeout = '10s';
SET LOCAL statement_timeout = '5min';

ALTER TABLE sink_offsets ADD COLUMN last_timestamp bigint;
COMMENT ON COLUMN sink_offsets.last_timestamp IS
    'the timestamp that the log has for the record before next_offset, in milliseconds since 1970; null when it is not known';

-- migrate:down

SET LOCAL lock_timeout = '10s';
SET LOCAL statement_timeout = '5min';

-- squawk-ignore ban-drop-column
ALTER TABLE sink_offsets DROP COLUMN last_timestamp;
