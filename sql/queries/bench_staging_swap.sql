-- Let the staged rows be moved, and new ones come into the empty table. Who stages waits, so offsets and rows belong together.
LOCK TABLE staged_metrics IN ACCESS EXCLUSIVE MODE;
ALTER TABLE moving_metrics RENAME TO empty_metrics;
ALTER TABLE staged_metrics RENAME TO moving_metrics;
ALTER TABLE empty_metrics RENAME TO staged_metrics;
UPDATE staging_state
SET
    waiting = (SELECT coalesce(sum(next_offset), 0) FROM sink_offsets WHERE topic = 'metrics'),
    most_bytes = greatest(most_bytes, pg_table_size('moving_metrics'))
