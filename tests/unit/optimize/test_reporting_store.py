"""Where a campaign's tracking store is remembered: never with its credentials."""

from pathlib import Path

import pytest

from optimize import reporting
from registry.errors import InputError


@pytest.mark.parametrize(
    "uri", ["http://ann:s3cret@host:5000", "https://s3cret@host", "postgresql://ann:s3cret@db/mlflow"]
)
def test_a_store_named_with_its_credentials_is_refused_and_not_kept(tmp_path: Path, uri: str) -> None:
    with pytest.raises(InputError, match=r"\*\*\*@") as raised:
        reporting.use_tracker(uri, tmp_path)
    assert "s3cret" not in str(raised.value)
    assert "MLFLOW_TRACKING_URI" in str(raised.value.hint)
    assert list(tmp_path.iterdir()) == []
