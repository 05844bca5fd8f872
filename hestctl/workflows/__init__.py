"""One module a command: what it does, from settings to a recorded run. Looks are the CLI's business."""
