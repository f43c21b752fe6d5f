-- Whether the archive that is noted of a partition is still whole: its name, folder and manifest; whether the table has the same file;
-- whether a trigger notes each change, and how many transactions have changed it since.
SELECT
    a.name,
    a.folder,
    a.manifest,
    coalesce(a.filenode = pg_relation_filenode(c.oid), false) AS same_file,
    EXISTS (
        SELECT FROM pg_trigger AS t
        WHERE t.tgrelid = c.oid AND t.tgname = 'metrics_9_note_change' AND t.tgenabled = 'A'
    ) AS watched,
    (SELECT count(*) FROM archive_changes AS x WHERE x.relation = c.oid) AS changes
FROM pg_class AS c
LEFT JOIN archived_partitions AS a ON a.relation = c.oid
WHERE c.oid = to_regclass(%(partition)s)
