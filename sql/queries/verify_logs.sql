-- The logs that the topic's name stood for, the present one last, each with the time at which it was noticed.
SELECT log_id, noticed_at FROM topic_logs WHERE topic = %(topic)s ORDER BY noticed_at
