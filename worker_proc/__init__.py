"""The worker: one device, the model on it, and a batch that lives there. Told which blocks to use, never chooses.

Importing this package imports no torch; the simulated worker runs without it.
"""
