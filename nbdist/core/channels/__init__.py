"""Channels: collectives along one mesh axis, always polled, so always interruptible."""

from nbdist.core.channels.base import Channel, Pending, SoloChannel
from nbdist.core.channels.hosts import HostsChannel
from nbdist.core.channels.process_group import ProcessGroupChannel
from nbdist.core.channels.shared_memory import SharedMemoryChannel

__all__ = ["Channel", "HostsChannel", "Pending", "ProcessGroupChannel", "SharedMemoryChannel", "SoloChannel"]
