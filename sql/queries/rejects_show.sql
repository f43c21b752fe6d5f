-- One rejected record with its bytes.
SELECT partition, "offset", reason, detail, rejected_at, replayed_at, key, payload
FROM rejected_metrics
WHERE topic = %(topic)s AND partition = %(partition)s AND "offset" = %(offset)s
