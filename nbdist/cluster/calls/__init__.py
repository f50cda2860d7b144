"""Calls to engines: started, pending, replied or failed; the interface behind which ipyparallel is."""
