"""What a user can set, as frozen dataclasses: one module per section of the configuration file.

Pure data without heavy imports, so that `wsiseg --help` can be generated from it at once.
"""
