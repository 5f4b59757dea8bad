"""The `.stream` log: records, writer, reader. Knows nothing of torch, zarr or xarray."""
