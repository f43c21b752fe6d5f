-- In Dagster's own database: forget evaluations of asset checks that are older than this, except the newest of each check.
DELETE FROM asset_check_executions
WHERE
    create_timestamp < now() AT TIME ZONE 'UTC' - make_interval(hours => %(hours)s)
    AND id NOT IN (SELECT max(id) FROM asset_check_executions GROUP BY asset_key, check_name)
