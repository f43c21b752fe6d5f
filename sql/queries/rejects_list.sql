-- The newest records that were rejected, without their bytes.
SELECT partition, "offset", reason, detail, rejected_at, replayed_at, octet_length(payload)
FROM rejected_metrics
WHERE
    topic = %(topic)s
    AND (%(reason)s::text IS NULL OR reason = %(reason)s)
    AND (%(every)s OR replayed_at IS NULL)
ORDER BY rejected_at DESC, partition, "offset" DESC
LIMIT %(limit)s
