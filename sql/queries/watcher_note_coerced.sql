-- Note what Kafka Connect makes of a record that cannot be stored.
INSERT INTO coerced_metrics (topic, partition, "offset", device_id, published_at, metric_name, value, tags)
VALUES (%s, %s, %s, %s, %s, %s, %s, %s)
ON CONFLICT DO NOTHING
