-- What came to a partition since a snapshot: each change with its key, whether a reading came by it or went, and whether it had been counted.
SELECT device_id, published_at, metric_name, rows, pg_visible_in_snapshot(changed_by, %(counted)s::text::pg_snapshot)
FROM late_changes
WHERE partition = %(partition)s AND NOT pg_visible_in_snapshot(changed_by, %(seen)s::text::pg_snapshot)
LIMIT %(most)s
