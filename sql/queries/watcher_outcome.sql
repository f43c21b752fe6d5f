-- Add to a rejected record what became of its row.
UPDATE rejected_metrics
SET detail = detail || %s
WHERE topic = %s AND partition = %s AND "offset" = %s
