"""What runs inside the containers of docker-compose.yaml, from the same code as the embedded stack."""
