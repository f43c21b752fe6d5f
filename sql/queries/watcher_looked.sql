-- The rows of some records were looked at: when is the next look due, or was this the last one?
UPDATE coerced_metrics AS c
SET
    looks = least(c.looks + 1, 32767),
    due_at = now() + make_interval(secs => coalesce((%(waits)s::double precision [])[c.looks + 1], 0)),
    settled_at = CASE WHEN c.looks >= cardinality(%(waits)s::double precision []) THEN now() END
FROM unnest(%(partitions)s::integer [], %(offsets)s::bigint []) AS p (partition, "offset")
WHERE c.topic = %(topic)s AND c.partition = p.partition AND c."offset" = p."offset"
