"""Input that nobody would write by hand, from a seed: every piece is taken, or refused in one sentence."""
