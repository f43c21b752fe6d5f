-- The same as archive_sums.sql, out of Parquet, by DuckDB; first and last published_at as well.
WITH readings AS (
    SELECT
        device_id || lpad(lower(to_hex(epoch_us(published_at) - 946684800000000)), 16, '0') || metric_name AS key,
        lpad(lower(to_hex(value::BIT::BIGINT)), 16, '0') AS value_bits,
        CASE
            WHEN len(tags) = 0 THEN '000000000000000000000019'
            ELSE
                '00000001' || CASE WHEN list_has_any(list_transform(tags, lambda tag: tag IS NULL), [true]) THEN '00000001' ELSE '00000000' END
                || '00000019' || lpad(lower(to_hex(len(tags))), 8, '0') || '00000001'
                || array_to_string(
                    list_transform(
                        tags, lambda tag: coalesce(lpad(lower(to_hex(strlen(tag))), 8, '0') || lower(hex(tag)), 'ffffffff')
                    ),
                    ''
                )
        END AS tags_bits,
        lpad(lower(to_hex(epoch_us(created_at) - 946684800000000)), 16, '0') AS created_bits,
        epoch_us(published_at) AS micros
    FROM read_parquet($files)
)

SELECT
    count(*),
    coalesce(sum(('0x' || left(md5(key), 15))::UBIGINT), 0),
    coalesce(sum(('0x' || left(md5(key || value_bits), 15))::UBIGINT), 0),
    coalesce(sum(('0x' || left(md5(key || tags_bits), 15))::UBIGINT), 0),
    coalesce(sum(('0x' || left(md5(key || created_bits), 15))::UBIGINT), 0),
    min(micros),
    max(micros)
FROM readings
