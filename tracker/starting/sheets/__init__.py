"""Sheets: their formats, and how their columns become inputs and tags."""
