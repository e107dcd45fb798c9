"""This package scores the VIG of every answer token by two passes per record, with its image and with a null image."""
