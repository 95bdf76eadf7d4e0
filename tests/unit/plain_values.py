"""Values of any kind that JSON or YAML can hold, for tests of what reads them."""

from typing import Any

from hypothesis import strategies as st

KEYS = st.text(max_size=6)


def plain_values(
    *leaves: st.SearchStrategy[Any], keys: st.SearchStrategy[Any] = KEYS
) -> st.SearchStrategy[Any]:
    """Small nested values.

    Args:
        leaves: values that the reader takes for special, besides those of every type.
        keys: of mappings.
    """
    return st.recursive(
        st.one_of(
            st.none(),
            st.booleans(),
            st.integers(-(2**70), 2**70),
            st.floats(),
            st.text(max_size=8),
            *leaves,
        ),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner),
        max_leaves=5,
    )
