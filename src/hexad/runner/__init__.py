"""One rank's work: a scheduled step becomes ragged arrays, a forward pass, and sampled tokens."""
