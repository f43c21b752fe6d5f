-- Let the connector be the one that stores the readings.
SELECT activate_connect()
