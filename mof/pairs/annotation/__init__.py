"""Blind pairs looked at by a person: a local page to describe them, and what comes of it as a benchmark."""
