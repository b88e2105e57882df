"""What a user does: each verb is a short composition of the rooms above it."""
