"""What serves the work on the package and is not part of it."""
