from webui.label_editor import decode_labels, encode_labels  # noqa: F401
