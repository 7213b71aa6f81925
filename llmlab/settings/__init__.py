"""Settings: one small frozen class a stage, from which options, help, schema, docs and trainer arguments follow.

Nothing here imports more than pydantic and PyYAML.
"""
