"""The network, the diffusion process around it, and its checkpoints."""
