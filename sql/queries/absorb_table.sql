-- All readings: of metrics, for summaries that begin again, or of a table that becomes a partition.
INSERT INTO summary_delta
SELECT
    device_id,
    metric_name,
    date_bin('1 hour', published_at, '2000-01-01 00:00:00+00') AS slot,
    date_bin('1 minute', created_at, '2000-01-01 00:00:00+00') AS minute,
    false,
    count(*),
    sum(value::text::numeric),
    min(value),
    max(value),
    min(published_at),
    max(published_at)
FROM {readings}
GROUP BY device_id, metric_name, slot, minute
