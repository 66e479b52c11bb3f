"""hexad beside other engines: the same model file and token ids, on one machine, by turns."""
