"""What Kafka Connect stores in silence although it should not: found, named as rejects, and put right."""
