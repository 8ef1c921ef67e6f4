"""Records -> what Seldon Core 2 serves: a model's folder as its agent fetches it, and the custom resources."""
