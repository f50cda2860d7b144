"""Channels: collectives along one mesh axis; links: messages between two ranks. Always polled, so interruptible."""

from nbdist.core.channels.base import Channel, Pending, SoloChannel
from nbdist.core.channels.hosts import HostsChannel
from nbdist.core.channels.link import Link, Message, ProcessGroupLink
from nbdist.core.channels.memory_link import SharedMemoryLink
from nbdist.core.channels.process_group import ProcessGroupChannel
from nbdist.core.channels.shared_memory import SharedMemoryChannel
from nbdist.core.channels.spent import spent

__all__ = [
    "Channel",
    "HostsChannel",
    "Link",
    "Message",
    "Pending",
    "ProcessGroupChannel",
    "ProcessGroupLink",
    "SharedMemoryChannel",
    "SharedMemoryLink",
    "SoloChannel",
    "spent",
]
