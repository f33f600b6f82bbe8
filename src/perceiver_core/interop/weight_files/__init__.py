"""Files of NumPy arrays, pickles and `.npz`: headers are checked before arrays are read, and nothing is executed."""
