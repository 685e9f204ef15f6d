"""The two libraries: found, loaded, and why not."""
