-- What was taken over from the connector lately: how often, how many records were stored and rejected, and is it happening now?
SELECT
    count(DISTINCT q.number),
    coalesce(sum(s.stored), 0)::bigint,
    coalesce(sum(s.rejected), 0)::bigint,
    coalesce(bool_or(q.ended_at IS NULL), false)
FROM quarantines AS q
LEFT JOIN quarantined_stretches AS s ON q.number = s.quarantine
WHERE
    q.topic = %(topic)s
    AND (q.ended_at IS NULL OR q.ended_at > now() - make_interval(secs => %(seconds)s))
