-- The readings of a partition in the order of their keys, for a binary COPY: columns of fixed width first, tags last.
SELECT device_id, published_at, metric_name, value, created_at, tags
FROM {partition}
ORDER BY device_id, published_at, metric_name
