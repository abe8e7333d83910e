"""Trained networks in other forms, and without what nothing depends on."""
