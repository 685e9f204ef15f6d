"""Modules over quantised weights."""
