-- Lock the rows that still are what Kafka Connect made of some records, and say of which records.
-- Rows that somebody else has locked are left for the next time: Connect locks in no order, and would lose one of two deadlocks.
SELECT c.partition, c."offset"
FROM coerced_metrics AS c
INNER JOIN unnest(%(partitions)s::integer [], %(offsets)s::bigint []) AS p (partition, "offset")
    ON c.partition = p.partition AND c."offset" = p."offset"
INNER JOIN metrics AS m
    ON
        m.device_id = c.device_id AND m.published_at = c.published_at AND m.metric_name = c.metric_name
        AND m.value = c.value AND m.tags = c.tags
WHERE c.topic = %(topic)s AND c.settled_at IS NULL
ORDER BY m.device_id, m.published_at, m.metric_name
FOR UPDATE OF m SKIP LOCKED
