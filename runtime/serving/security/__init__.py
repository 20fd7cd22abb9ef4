"""Limits, keys, decoding and fetching: what stands between the network and the engine."""
