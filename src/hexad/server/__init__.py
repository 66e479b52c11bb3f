"""The HTTP server: a loaded model behind the APIs that clients know."""
