"""What stands for the parts of a decoder layer, a file a kind."""
