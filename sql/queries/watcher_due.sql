-- Records that Kafka Connect coerced, that the sink has passed and whose rows are to be looked at now.
-- created_at is null when the row of the key is not what Connect made of the record.
SELECT c.partition, c."offset", c.looks, c.device_id, c.published_at, c.metric_name, c.value, c.tags, m.created_at
FROM coerced_metrics AS c
INNER JOIN unnest(%(partitions)s::integer [], %(passed)s::bigint []) AS p (partition, passed)
    ON c.partition = p.partition AND c."offset" < p.passed
LEFT JOIN metrics AS m
    ON
        m.device_id = c.device_id AND m.published_at = c.published_at AND m.metric_name = c.metric_name
        AND m.value = c.value AND m.tags = c.tags
WHERE c.topic = %(topic)s AND c.settled_at IS NULL AND c.due_at <= now()
ORDER BY c.due_at
LIMIT %(limit)s
