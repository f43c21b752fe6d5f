-- The growth of a log that is to be settled next.
SELECT growth_id, partitions_before, partitions_after, passed, begins, due_at <= clock_timestamp(), extract(EPOCH FROM noticed_at)::double precision
FROM topic_growths
WHERE topic = %(topic)s AND log_id = %(log_id)s AND settled_at IS NULL
ORDER BY growth_id
LIMIT 1
