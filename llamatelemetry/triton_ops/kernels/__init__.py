"""The kernels' bodies, in Triton's language, a file a subject."""
