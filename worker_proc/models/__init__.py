"""Model definitions: one short file for each family, over the shared decoder, found by architecture name."""
