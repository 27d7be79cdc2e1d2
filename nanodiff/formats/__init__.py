"""Reading and writing the file formats of other projects."""
