"""What is on the glass: reading slides by mpp, tissue, stain, cohorts."""
