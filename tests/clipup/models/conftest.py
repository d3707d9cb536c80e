"""Models on the Hugging Face hub, as they lie in its cache."""

import shutil

import pytest

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def publish(tmp_path):
    """Copies a directory into a cache, as if it had been downloaded as org/NAME."""

    def put(directory, name):
        repository = tmp_path / "cache" / f"models--org--{name}"
        (repository / "refs").mkdir(parents=True)
        (repository / "refs" / "main").write_text(COMMIT)
        shutil.copytree(directory, repository / "snapshots" / COMMIT)
        return {"cache_dir": str(tmp_path / "cache")}

    return put
