-- Note how far a quarantine is in some partitions, in the transaction that stores the records before.
INSERT INTO quarantined_stretches AS s (quarantine, partition, first_offset, next_offset, stored, rejected)
SELECT %(quarantine)s, c.partition, c.first_offset, c.next_offset, c.stored, c.rejected
FROM
    unnest(%(partitions)s::integer[], %(starts)s::bigint[], %(stops)s::bigint[], %(stored)s::bigint[], %(rejected)s::bigint[])
    AS c (partition, first_offset, next_offset, stored, rejected)
ON CONFLICT (quarantine, partition) DO UPDATE
SET
    next_offset = excluded.next_offset,
    stored = s.stored + excluded.stored,
    rejected = s.rejected + excluded.rejected
