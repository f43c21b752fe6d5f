-- When was the newest reading stored? As of the summaries; only the readings of its minute are looked at, from an instant on if one is given.
SELECT max(m.created_at)
FROM metrics AS m
WHERE
    m.created_at >= greatest((SELECT max(minute) FROM ingestion_minutes), %(since)s::timestamptz)
    AND m.created_at < (SELECT max(minute) FROM ingestion_minutes) + interval '1 minute'
