-- How far the watcher has read a partition, how many records wait behind, and how far the active sink is (null: not known).
INSERT INTO watcher_offsets AS w (topic, partition, log_id, next_offset, waiting, passed)
VALUES (%s, %s, %s, %s, %s, %s)
ON CONFLICT (topic, partition) DO UPDATE
SET
    log_id = excluded.log_id,
    next_offset = excluded.next_offset,
    waiting = excluded.waiting,
    passed = CASE WHEN w.log_id = excluded.log_id THEN coalesce(excluded.passed, w.passed) ELSE excluded.passed END,
    updated_at = now()
