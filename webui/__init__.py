"""The web page: one builder, fed with a small description of the condition. Gradio is imported here alone."""
