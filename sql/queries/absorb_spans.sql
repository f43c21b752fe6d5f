-- Which spans of created_at hold the readings that are not yet in the summaries? At most 64, cut at the widest gaps.
WITH instants AS (
    SELECT DISTINCT created_at FROM summary_inserts
),
gaps AS (
    SELECT created_at, created_at - lag(created_at) OVER (ORDER BY created_at) AS gap FROM instants
),
ranked AS (
    SELECT created_at, gap, row_number() OVER (ORDER BY gap DESC NULLS FIRST) AS width_rank FROM gaps
),
numbered AS (
    SELECT
        created_at,
        count(*) FILTER (WHERE width_rank <= 64 AND gap > interval '10 seconds') OVER (ORDER BY created_at) AS span
    FROM ranked
)
SELECT min(created_at), max(created_at) FROM numbered GROUP BY span ORDER BY span
