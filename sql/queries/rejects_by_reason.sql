-- How many records were rejected, by reason? `since` bounds their age in seconds, null does not.
SELECT reason, count(*)
FROM rejected_metrics
WHERE
    topic = %(topic)s
    AND (%(reason)s::text IS NULL OR reason = %(reason)s)
    AND (%(every)s OR replayed_at IS NULL)
    AND (%(since)s::double precision IS NULL OR rejected_at > now() - make_interval(secs => %(since)s))
GROUP BY reason
ORDER BY count(*) DESC, reason
