-- Keep a record that could not be stored. One that was rejected before and is delivered again is the same record.
INSERT INTO rejected_metrics (topic, log_id, partition, "offset", reason, detail, key, payload)
VALUES (%s, %s, %s, %s, %s, %s, %s, %s)
ON CONFLICT (topic, partition, "offset", log_id) DO UPDATE
SET reason = excluded.reason, detail = excluded.detail, key = excluded.key, payload = excluded.payload, rejected_at = now()
