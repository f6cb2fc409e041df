"""Explaining a call, checking and reporting an installation."""
