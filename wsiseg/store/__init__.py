"""What is on disk between stages: zarr v3 groups with a ledger of finished work."""
