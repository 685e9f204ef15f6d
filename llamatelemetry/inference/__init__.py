"""Generation: recordings, the engine and what it is made of."""
