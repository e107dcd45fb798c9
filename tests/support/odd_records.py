"""A hypothesis strategy of damaged records: each part is missing, right, or any value."""

from __future__ import annotations

from hypothesis import strategies as st

CONVERSATION = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A dog."}]
_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.binary(max_size=8)
    | st.sampled_from(["0.png", "<image>"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5) | st.integers(), inner, max_size=3),
    max_leaves=6,
)
_TURN = st.fixed_dictionaries(
    {},
    optional={
        "from": st.sampled_from(["human", "gpt", "system"]) | _VALUES,
        "role": st.sampled_from(["user", "assistant", "system"]) | _VALUES,
        "value": st.sampled_from(["<image>\nHi", "Ho", ""]) | _VALUES,
        "content": st.sampled_from([[{"type": "image"}], [{"type": "text", "text": "x"}], "Hi"]) | _VALUES,
    },
)
_RECORD = st.fixed_dictionaries(
    {},
    optional={
        "id": st.text(max_size=3) | _VALUES,
        "image": st.sampled_from(["0.png", ["0.png"]]) | _VALUES,
        "images": _VALUES,
        "conversations": st.lists(_TURN, max_size=3) | _VALUES | st.just(CONVERSATION),
        "messages": st.lists(_TURN, max_size=3) | _VALUES,
    },
)
ODD_RECORDS = _RECORD | _VALUES | st.lists(_TURN, max_size=2)
