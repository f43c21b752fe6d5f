-- Let the COPY sink read some partitions again; none moves forward.
UPDATE sink_offsets AS o
SET next_offset = m.next_offset, last_timestamp = NULL, updated_at = now()
FROM unnest(%(partitions)s::integer[], %(offsets)s::bigint[]) AS m (partition, next_offset)
WHERE o.topic = %(topic)s AND o.log_id = %(log_id)s AND o.partition = m.partition AND o.next_offset > m.next_offset
