"""VIG of every answer token: two passes per record, with its image and with a null image; scores on disk."""
