-- Note a record that cannot be stored, unless it is noted already: what is there knows more, or is the same.
INSERT INTO rejected_metrics (log_id, topic, partition, "offset", reason, detail, key, payload)
VALUES (%s, %s, %s, %s, %s, %s, %s, %s)
ON CONFLICT DO NOTHING
