-- The growths of a log: how many partitions there were and are, and whether the sink has read again what it had to.
SELECT partitions_before, partitions_after, bool_and(settled_at IS NOT NULL)
FROM topic_growths
WHERE topic = %(topic)s AND log_id = %(log_id)s
GROUP BY partitions_before, partitions_after
ORDER BY partitions_before
