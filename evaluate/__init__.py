"""The papers' evaluation protocols: one file a protocol. `python -m evaluate --help`"""
