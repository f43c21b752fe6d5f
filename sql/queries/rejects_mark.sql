-- Note that rejected records were published again.
UPDATE rejected_metrics AS r
SET replayed_at = clock_timestamp()
FROM unnest(%(logs)s::text[], %(partitions)s::integer[], %(offsets)s::bigint[]) AS p (log_id, partition, "offset")
WHERE r.topic = %(topic)s AND r.log_id = p.log_id AND r.partition = p.partition AND r."offset" = p."offset" AND r.replayed_at IS NULL
