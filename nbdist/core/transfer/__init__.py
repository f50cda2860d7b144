"""Objects between processes: payloads in shared memory."""
