"""Routes by subject. Every module here has `routes(context) -> list[Route]`, which `app.py` mounts."""
