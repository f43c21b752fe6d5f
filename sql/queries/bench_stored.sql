-- When did the first transaction that stored a row begin, when did the last one commit, and how many rows are there?
-- The commit times are null unless track_commit_timestamp is on.
SELECT
    min(created_at) AS first_began,
    max(created_at) AS last_began,
    max(CASE WHEN current_setting('track_commit_timestamp')::boolean THEN pg_xact_commit_timestamp(writer) END)
        AS last_committed,
    sum(rows)::bigint AS rows,
    count(*) AS transactions
FROM (
    SELECT xmin AS writer, min(created_at) AS created_at, count(*) AS rows
    FROM metrics
    WHERE created_at >= %(since)s
    GROUP BY xmin
) AS transactions
