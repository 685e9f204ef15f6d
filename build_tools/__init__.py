"""The build of the libraries, apart from setuptools: setup.py calls it, tests read it."""
