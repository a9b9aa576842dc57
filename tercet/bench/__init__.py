"""Benchmarks as commands: a load generator for OpenAI-compatible servers, and measurements of an engine offline.

The load generator knows HTTP and the OpenAI API, nothing of engines: it measures any server alike.
"""
