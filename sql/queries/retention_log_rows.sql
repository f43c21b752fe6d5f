-- Note the readings of a partition as gone, so that the next tick takes them off one by one.
INSERT INTO summary_changes (device_id, published_at, metric_name, old_value, old_created_at, old_xmin)
SELECT device_id, published_at, metric_name, value, created_at, xmin FROM {table}
