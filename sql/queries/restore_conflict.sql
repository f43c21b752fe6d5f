-- A reading that is to be restored, and is there with another value or other tags.
SELECT r.device_id, r.published_at, r.metric_name
FROM {restored} AS r
INNER JOIN {table} AS m USING (device_id, published_at, metric_name)
WHERE float8send(m.value) <> float8send(r.value) OR m.tags <> r.tags
LIMIT 1
