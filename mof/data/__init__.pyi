from .answer_tokens import Example, encode_record
from .collator import SupervisedCollator, collate
from .record_files import UnreadableRow
from .records import Record, RecordError, to_record
from .rows import read_records, read_rows

__all__ = [
    "Example",
    "Record",
    "RecordError",
    "SupervisedCollator",
    "UnreadableRow",
    "collate",
    "encode_record",
    "read_records",
    "read_rows",
    "to_record",
]
