"""The embedded stack: PostgreSQL 17, an Apache Kafka broker, Kafka Connect and Dagster as ordinary processes of this machine."""
