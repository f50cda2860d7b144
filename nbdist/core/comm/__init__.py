"""Communication between ranks: collectives along a mesh axis (channels), point-to-point messages (links).

Every wait polls, so an interrupt lands at once.
"""

from nbdist.core.comm.channel import Channel, Pending, SoloChannel
from nbdist.core.comm.comm_timer import comm_timer
from nbdist.core.comm.hierarchical import HierarchicalChannel
from nbdist.core.comm.p2p import Link, Message, ProcessGroupLink
from nbdist.core.comm.p2p_shared_memory import SharedMemoryLink
from nbdist.core.comm.p2p_tcp import TcpLink
from nbdist.core.comm.process_group import ProcessGroupChannel
from nbdist.core.comm.shared_memory import SharedMemoryChannel

__all__ = [
    "Channel",
    "HierarchicalChannel",
    "Link",
    "Message",
    "Pending",
    "ProcessGroupChannel",
    "ProcessGroupLink",
    "SharedMemoryChannel",
    "SharedMemoryLink",
    "SoloChannel",
    "TcpLink",
    "comm_timer",
]
