"""Images: files are read, decoded and resized to pixels; folders, lists and tars are searched."""
