"""Hosts: what is started, watched, signalled and held on each of them; through an agent where it is another one."""
