"""What every training needs: a run, its checkpoints, batches and devices."""
