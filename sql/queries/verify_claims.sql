-- What each producer run was acknowledged, by partition, with its ranges of offsets (upper ends excluded).
SELECT
    run_id::text,
    partition,
    log_id,
    acknowledged,
    coalesce(
        (
            SELECT array_agg(ARRAY[lower(piece), upper(piece)] ORDER BY piece)
            FROM unnest(offsets) AS piece
        ),
        '{}'
    )
FROM producer_runs
WHERE partition >= 0
ORDER BY partition, started_at, run_id
