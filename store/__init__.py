"""Content: blobs by digest, registries, image records, layers. Imports neither fs nor runtime."""
