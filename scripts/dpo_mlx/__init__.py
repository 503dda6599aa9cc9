"""The library behind the numbered scripts: DPO with LoRA on MLX, one room per job."""
