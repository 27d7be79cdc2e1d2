"""Small changes to large networks: LoRA adapters."""
