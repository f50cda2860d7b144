"""How a plan is applied to a model: data parallel, tensor, pipeline and sharded strategies, and their meshes."""
