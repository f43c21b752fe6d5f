-- Note that a partition is archived; what it knew of others that are gone is forgotten.
WITH seen AS (
    DELETE FROM archive_changes
    WHERE relation = %(relation)s AND version = ANY(%(changes)s::text []::xid8 [])
),

gone_changes AS (
    DELETE FROM archive_changes AS x
    WHERE NOT EXISTS (SELECT FROM pg_class AS c WHERE c.oid = x.relation)
),

gone AS (
    DELETE FROM archived_partitions AS a
    WHERE NOT EXISTS (SELECT FROM pg_class AS c WHERE c.oid = a.relation)
)

INSERT INTO archived_partitions (relation, filenode, name, folder, manifest)
VALUES (%(relation)s, %(filenode)s, %(name)s, %(folder)s, %(manifest)s)
ON CONFLICT (relation) DO UPDATE
SET filenode = excluded.filenode, name = excluded.name, folder = excluded.folder, manifest = excluded.manifest, noted_at = now()
