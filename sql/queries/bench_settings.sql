-- PostgreSQL settings that durability and speed depend on.
SELECT name, current_setting(name)
FROM pg_settings
WHERE name IN (
    'checkpoint_completion_target', 'checkpoint_timeout', 'data_checksums', 'effective_cache_size', 'fsync', 'full_page_writes',
    'maintenance_work_mem', 'max_wal_size', 'shared_buffers', 'synchronous_commit', 'track_commit_timestamp', 'wal_buffers',
    'wal_compression', 'wal_level', 'wal_sync_method', 'work_mem'
)
ORDER BY name
