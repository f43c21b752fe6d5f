-- Keep records that could not be stored, each once. One that was rejected before and is delivered again is the same record.
-- They come as JSON, since psycopg needs longer for arrays of bytes than for everything else that is done with a bad record.
INSERT INTO rejected_metrics (topic, log_id, partition, "offset", reason, detail, key, payload)
SELECT
    %(topic)s,
    -- Who does not say which log reads the present one.
    coalesce(
        nullif(r.log_id, ''),
        (SELECT t.log_id FROM topic_logs AS t WHERE t.topic = 'metrics' ORDER BY t.noticed_at DESC LIMIT 1),
        ''
    ),
    r.partition,
    r."offset",
    r.reason,
    r.detail,
    decode(r.key, 'base64'),
    decode(r.payload, 'base64')
FROM
    json_to_recordset(%(records)s) AS r (
        log_id text, partition integer, "offset" bigint, reason text, detail text, key text, payload text
    )
ON CONFLICT (topic, partition, "offset", log_id) DO UPDATE
SET reason = excluded.reason, detail = excluded.detail, key = excluded.key, payload = excluded.payload, rejected_at = now()
