-- How far the watcher has read a partition, how many records wait behind, and how far the active sink is (null: not known).
INSERT INTO watcher_offsets AS w (topic, partition, next_offset, waiting, passed)
VALUES (%s, %s, %s, %s, %s)
ON CONFLICT (topic, partition) DO UPDATE
SET
    next_offset = excluded.next_offset, waiting = excluded.waiting, passed = coalesce(excluded.passed, w.passed), updated_at = now()
