-- Let the COPY sink begin where the connector stood; with `back`, only where that is before its own offset.
INSERT INTO sink_offsets AS o (topic, partition, log_id, next_offset)
SELECT %(topic)s, c.partition, %(log_id)s, c.next_offset
FROM unnest(%(partitions)s::integer[], %(offsets)s::bigint[]) AS c (partition, next_offset)
ORDER BY c.partition
ON CONFLICT (topic, partition) DO UPDATE
SET log_id = excluded.log_id, next_offset = excluded.next_offset, last_timestamp = NULL, updated_at = now()
WHERE
    o.log_id <> excluded.log_id
    OR o.next_offset > excluded.next_offset
    OR (o.next_offset < excluded.next_offset AND NOT %(back)s)
RETURNING o.partition, o.next_offset
