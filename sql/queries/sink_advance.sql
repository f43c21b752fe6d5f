-- Move the offsets of partitions that are locked; one that is not where it was expected stays.
-- All of them stay when another sink has become the active one: a statement that waited for the locks does not see that, because it
-- began before.
UPDATE sink_offsets AS o
SET next_offset = m.stop, last_timestamp = m.stamp, updated_at = now()
FROM
    unnest(%(partitions)s::integer[], %(logs)s::text[], %(starts)s::bigint[], %(stops)s::bigint[], %(stamps)s::bigint[])
    AS m (partition, log_id, start, stop, stamp)
WHERE
    o.topic = %(topic)s
    AND o.partition = m.partition
    AND o.next_offset = m.start
    AND o.log_id = m.log_id
    AND (SELECT s.active = 'copy' FROM sink_state AS s)
