"""The command line; importing this package costs nothing."""
