"""Who stores the readings: which sink is active, the change between them, and the repair of Connect's."""
