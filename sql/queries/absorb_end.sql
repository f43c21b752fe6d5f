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
    rows = rows + (SELECT coalesce(sum(d.rows), 0) FROM summary_minutes AS d),
    absorbed_at = statement_timestamp()
RETURNING rows
