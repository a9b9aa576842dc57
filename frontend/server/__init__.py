"""The OpenAI-compatible HTTP server: an ordinary frontend that speaks HTTP on its other side.

`app.create_app` makes the ASGI application of an engine, `serving.serve` runs it. What a request may hold is
`protocol.py`; what each parameter means is `parameters.py`; each folder entry of `routes/` is a set of routes.
"""
