import functools

import pytest
import vl_convert


@pytest.fixture(autouse=True, scope="session")
def one_bundle():
    """The script of a page is the same for every report, and bundling it takes longer than the rest of a report."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vl_convert, "javascript_bundle", functools.cache(vl_convert.javascript_bundle))
        yield
