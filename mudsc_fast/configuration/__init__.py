"""Configuration files: their schemas, and errors that name the line and the nearest valid key."""
