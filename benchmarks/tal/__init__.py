"""Temporal action localization, end to end."""
