"""Static networks: codes flow from layer to layer, and floats only where there is no step for them.

`lowbit.prepare` captures a model, `lowbit.convert` makes a `Network` of it.
"""

from lowbit.static.network import Network
from lowbit.static.prepared import PreparedNetwork

__all__ = ["Network", "PreparedNetwork"]
