-- Which partition an archive holds, and what has changed in it since.
--
-- A partition that is archived has a trigger of its own, so that a late reading is noted in the transaction that stores it: whether an
-- archive is still whole is then known without a look at the readings. metrics_pipeline/archive makes the trigger.

-- migrate:up

SET LOCAL lock_timeout = '10s';
SET LOCAL statement_timeout = '5min';

CREATE TABLE archived_partitions (
    relation oid CONSTRAINT archived_partitions_pkey PRIMARY KEY,
    filenode oid NOT NULL,
    name text NOT NULL,
    folder text NOT NULL,
    manifest text NOT NULL,
    noted_at timestamptz NOT NULL DEFAULT now()
);
COMMENT ON TABLE archived_partitions IS 'The archive of each partition that has one.';
COMMENT ON COLUMN archived_partitions.relation IS 'the table of the partition';
COMMENT ON COLUMN archived_partitions.filenode IS 'its file: a TRUNCATE or a rewrite makes another one';
COMMENT ON COLUMN archived_partitions.name IS 'of the archive';
COMMENT ON COLUMN archived_partitions.folder IS 'METRICS_ARCHIVE at that time';
COMMENT ON COLUMN archived_partitions.manifest IS 'SHA-256 of its manifest';

CREATE TABLE archive_changes (
    relation oid NOT NULL,
    version xid8 NOT NULL,
    CONSTRAINT archive_changes_pkey PRIMARY KEY (relation, version)
);
COMMENT ON TABLE archive_changes IS 'Transactions that have changed a partition which was archived, or was about to be.';

-- A row for each transaction, so that no writer waits for another one.
CREATE FUNCTION note_archive_change() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    INSERT INTO public.archive_changes (relation, version) VALUES (TG_RELID, pg_current_xact_id())
    ON CONFLICT DO NOTHING;
    RETURN NULL;
END
$$;

-- migrate:down

SET LOCAL lock_timeout = '10s';
SET LOCAL statement_timeout = '5min';

-- With the triggers of the partitions.
DROP FUNCTION note_archive_change() CASCADE;
DROP TABLE archive_changes;
DROP TABLE archived_partitions;
