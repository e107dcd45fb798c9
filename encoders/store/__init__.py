"""Features kept on disk, to be read in place of running an encoder."""
