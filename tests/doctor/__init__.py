"""`tracker doctor`: what it finds in a sound deployment and in broken ones."""
