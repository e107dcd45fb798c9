"""What tests of several packages share: tiny models, checkpoints in published layouts, stand-ins for servers, scripts for processes."""
