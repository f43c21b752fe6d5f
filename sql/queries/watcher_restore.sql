-- Put a reading back that Kafka Connect had overwritten.
UPDATE metrics
SET value = %s, tags = %s
WHERE device_id = %s AND published_at = %s AND metric_name = %s
