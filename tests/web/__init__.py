"""The HTTP side over real HTTP, on real databases."""
