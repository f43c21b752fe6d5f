-- One rejected record with its bytes: of several logs, the one that was rejected last.
SELECT partition, "offset", reason, detail, rejected_at, replayed_at, key, payload
FROM rejected_metrics
WHERE topic = %(topic)s AND partition = %(partition)s AND "offset" = %(offset)s
ORDER BY rejected_at DESC
LIMIT 1
