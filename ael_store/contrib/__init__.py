"""Faces of neighbouring systems, over what ael_store does itself."""
