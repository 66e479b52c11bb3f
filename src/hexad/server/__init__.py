"""`hexad serve`: a loaded model behind the APIs that clients already speak."""
