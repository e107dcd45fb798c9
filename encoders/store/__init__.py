"""encoders.store keeps features on disk, so that they can be read instead of running an encoder."""
