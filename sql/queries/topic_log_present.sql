-- Which log the topic's name stood for when it was last looked at, and how many partitions it had.
SELECT log_id, partitions
FROM topic_logs
WHERE topic = %(topic)s
ORDER BY noticed_at DESC
LIMIT 1
