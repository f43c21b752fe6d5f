-- Keys of a partition that changed since a snapshot: how many readings more there are of each, and how many as another snapshot shows it.
SELECT
    device_id,
    published_at,
    metric_name,
    sum(rows)::integer,
    coalesce(sum(rows) FILTER (WHERE NOT pg_visible_in_snapshot(changed_by, %(counted)s::text::pg_snapshot)), 0)::integer
FROM late_changes
WHERE partition = %(partition)s AND NOT pg_visible_in_snapshot(changed_by, %(seen)s::text::pg_snapshot)
GROUP BY device_id, published_at, metric_name
LIMIT %(most)s
