"""What a user does: one verb per file, composed from `pipeline`, `model` and `cluster`. `cli` is the door, `recipe` the form."""
