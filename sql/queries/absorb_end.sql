-- Note how far the summaries are, and forget what they contain now; the total is the result.
WITH inserts AS (
    DELETE FROM summary_inserts
),
changes AS (
    DELETE FROM summary_changes
)
UPDATE summary_state
SET
    source = metrics_source(),
    rows = rows + (SELECT coalesce(sum(CASE WHEN removed THEN -d.rows ELSE d.rows END), 0) FROM summary_delta AS d),
    absorbed_at = statement_timestamp()
RETURNING rows
