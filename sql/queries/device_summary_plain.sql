-- Per device: readings, first and last published_at, counted over all readings.
SELECT device_id, count(*) AS rows, min(published_at) AS first_seen, max(published_at) AS last_seen
FROM metrics
GROUP BY device_id
ORDER BY device_id
