"""Where batches come from: sources, transforms on numpy and OpenCV, and the pipeline that puts them together."""
