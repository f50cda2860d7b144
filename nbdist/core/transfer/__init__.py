"""Sending objects between processes: pickled payloads, with tensors in shared memory."""
