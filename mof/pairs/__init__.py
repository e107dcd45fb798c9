"""The exact search for blind pairs."""
