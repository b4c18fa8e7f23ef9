"""The namespace in which the ops of one copy of these files are registered with torch.

A process may hold several copies, of this and of other models, and names are taken once.
"""

import zlib

NAMESPACE = f"rondo_{zlib.crc32(__name__.encode()):08x}"
