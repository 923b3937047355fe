"""The pipeline, one module a stage: wiring only. Stages meet through files, never by import."""
