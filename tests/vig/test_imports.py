"""`vig` takes any image-text-to-text model, so it loads neither the models of `mof` nor its pair search."""

from __future__ import annotations

import pytest
from support import launch

SCRIPT = """
import sys
import vig
assert not any(name.startswith("mof") for name in sys.modules), "before anything is used"
for name in vig.__all__:
    getattr(vig, name)
print(*(name for name in sorted(sys.modules) if name.split(".")[0] == "mof"))
"""


@pytest.mark.slow
def test_vig_loads_of_mof_only_the_way_from_records_to_batches() -> None:
    (loaded,) = launch.run(SCRIPT, by=launch.FRESH)
    assert "mof.data.collator" in loaded.split()
    assert all(name == "mof" or name.startswith("mof.data") for name in loaded.split()), loaded
