"""Is it all there? Topic, table and ledger, compared record by record."""
