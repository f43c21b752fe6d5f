"""A reading is made, published, and what was promised of it is written down."""
