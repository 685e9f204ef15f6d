"""A server of the OpenAI-compatible HTTP API over the continuous batcher; needs the extra serve."""
