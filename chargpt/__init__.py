"""chargpt: turn any text into a small GPT that you can study, compare and sample."""

__version__ = "0.1.0"
