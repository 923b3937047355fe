"""Whole-slide-image segmentation, in the order of the pipeline.

tile -> pretrain -> finetune -> segment -> export, and evaluate. Each word is a command, a module
in `wsiseg.stages`, a section of the configuration file and a rule of the workflow.
"""

__version__ = "0.1.0"
