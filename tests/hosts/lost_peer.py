"""A rank of a world over several hosts, as torchrun starts it: all-reduces until another one is gone, and leaves."""

from __future__ import annotations

import sys

import torch

from nbdist.core.comm.world import World
from nbdist.errors import PeerLostError


def main() -> None:
    """Print what happens."""
    with World.from_environment("cpu") as world:
        channel = world.channel()
        print("formed", flush=True)
        try:
            while True:
                channel.all_reduce_(torch.ones(1000))
        except PeerLostError:
            print("lost", flush=True)
    print("left", flush=True)
    sys.stdin.read()


main()
