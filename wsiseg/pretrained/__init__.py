"""Models that come with the package: a run folder each, found by `wsiseg.models.packaged`."""
