-- Per device and metric: readings, extremes and mean of the value, counted over all readings.
SELECT
    device_id,
    metric_name,
    count(*) AS rows,
    min(value),
    -- Added up as decimals: the order of a sum of doubles would show in its last digits.
    metric_mean(sum(value::text::numeric), count(*)) AS mean,
    max(value),
    min(published_at) AS first_seen,
    max(published_at) AS last_seen
FROM metrics
GROUP BY device_id, metric_name
ORDER BY device_id, metric_name
