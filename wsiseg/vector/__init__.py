"""How pathologists see it: exact polygons and QuPath's GeoJSON."""
