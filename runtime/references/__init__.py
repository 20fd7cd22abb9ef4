"""Reference sets: made, kept, saved."""
