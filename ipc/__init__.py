"""The ground floor: the protocol, its codec, typed channels and the life of processes.

Knows nothing of schedulers, models or text.
"""
