"""Views of a model: the decisions of its reads, its attention maps and its architecture."""
