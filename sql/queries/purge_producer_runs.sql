-- Delete runs that ended long ago and of whose records the topic holds none any more: nothing could be compared with them.
DELETE FROM producer_runs AS old
WHERE
    old.run_id IN (
        SELECT run.run_id
        FROM producer_runs AS run
        LEFT JOIN unnest(%(partitions)s::integer[], %(lows)s::bigint[]) AS topic (partition, low)
            ON run.partition = topic.partition
        GROUP BY run.run_id
        HAVING
            max(run.updated_at) < now() - %(hours)s * interval '1 hour'
            -- A partition that the topic does not have tells nothing.
            -- Of a former log it holds none at all.
            AND bool_and(
                isempty(run.offsets)
                OR run.log_id NOT IN ('', %(log_id)s)
                OR coalesce(upper(run.offsets) <= topic.low, false)
            )
    )
