-- What was stored since then, by which transactions, and how much of it by those that began after the first one had committed?
-- The commit times, and so the last figure, are null unless track_commit_timestamp is on.
WITH transactions AS (
    SELECT xmin AS writer, min(created_at) AS began, count(*) AS rows
    FROM metrics
    WHERE created_at >= %(since)s
    GROUP BY xmin
),

timed AS (
    SELECT
        began,
        rows,
        CASE WHEN current_setting('track_commit_timestamp')::boolean THEN pg_xact_commit_timestamp(writer) END AS committed
    FROM transactions
)

SELECT
    min(began) AS first_began,
    min(committed) AS first_committed,
    max(committed) AS last_committed,
    sum(rows)::bigint AS rows,
    count(*) AS transactions,
    (sum(rows) FILTER (WHERE began >= (SELECT min(committed) FROM timed)))::bigint AS rows_after_first
FROM timed
