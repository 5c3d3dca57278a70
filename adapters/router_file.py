"""The router: the routing logits of one task for one inventory; one small safetensors file."""
