-- Move the staged rows in the order of their keys; fails when a key is there already, or comes twice.
INSERT INTO metrics (device_id, published_at, metric_name, value, tags)
SELECT device_id, published_at, metric_name, value, tags
FROM moving_metrics
ORDER BY device_id, published_at, metric_name
