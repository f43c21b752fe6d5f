-- Where the records stand that were rejected, and which of them were published again before a moment.
SELECT partition, "offset", coalesce(replayed_at < %(before)s, false)
FROM rejected_metrics
WHERE topic = %(topic)s AND log_id IN ('', %(log_id)s)
