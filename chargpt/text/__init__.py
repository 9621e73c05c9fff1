"""Text: where it comes from.

catalogue.py   the texts that have a name
download.py    how their bytes are had and verified
readers.py     the user's own files and folders
"""

from chargpt.text.catalogue import fetch, prepare
from chargpt.text.readers import read_text

__all__ = [
    "fetch",
    "prepare",
    "read_text",
]
