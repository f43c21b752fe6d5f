-- Keep a record that could not be stored. One that was rejected before and is delivered again is the same record.
INSERT INTO rejected_metrics (topic, log_id, partition, "offset", reason, detail, key, payload)
VALUES (
    %s,
    -- Who does not say which log reads the present one.
    coalesce(nullif(%s, ''), (SELECT t.log_id FROM topic_logs AS t WHERE t.topic = 'metrics' ORDER BY t.noticed_at DESC LIMIT 1), ''),
    %s, %s, %s, %s, %s, %s
)
ON CONFLICT (topic, partition, "offset", log_id) DO UPDATE
SET reason = excluded.reason, detail = excluded.detail, key = excluded.key, payload = excluded.payload, rejected_at = now()
