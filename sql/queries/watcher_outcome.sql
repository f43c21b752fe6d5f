-- Add to a rejected record what became of its row.
UPDATE rejected_metrics AS r
SET detail = detail || %s
WHERE
    r.topic = %s
    AND r.partition = %s
    AND r."offset" = %s
    AND r.log_id = coalesce((SELECT t.log_id FROM topic_logs AS t WHERE t.topic = r.topic ORDER BY t.noticed_at DESC LIMIT 1), '')
