"""The frontend: text in, text out. Validation, tokenizing, detokenizing, streams, and the public classes.

Talks to a core through `tercet.ipc` only, and imports neither torch nor transformers.
"""
