"""Loading a checkpoint runs no pickled code, even if its digests are consistent."""

import hashlib
import io
import json
import os
import pickle

import pytest
import torch
from test_checkpoint import layout, step, trainable_model  # noqa: F401  (layout is a fixture)

from megatron_s2d.errors import UserError


class Hostile:
    """Creates the file ``path`` when it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.fixture
def saved(layout, tmp_path):  # noqa: F811
    model = trainable_model(layout)
    step(model, 0)
    model.save(tmp_path / "c", {"step": 1, "updates": 1}, with_optimizer=True)
    return tmp_path / "c"


def update_digests(directory):
    """Recompute the digests, as an attacker who can write to the directory would."""
    path = directory / "integrity.json"
    content = json.loads(path.read_text())
    for name in {path.name for path in directory.iterdir()} - {"integrity.json"}:
        content["files"][name] = hashlib.sha256((directory / name).read_bytes()).hexdigest()
    path.write_text(json.dumps(content))


def test_pickled_code_in_the_metadata_is_refused(layout, saved, tmp_path):  # noqa: F811
    (saved / ".metadata").write_bytes(pickle.dumps(Hostile(tmp_path / "ran")))
    update_digests(saved)
    with pytest.raises(UserError, match=r"mkdir does not belong in checkpoint metadata"):
        trainable_model(layout).load(saved)
    assert not (tmp_path / "ran").exists()


def test_pickled_code_in_a_shard_is_refused(layout, saved, tmp_path):  # noqa: F811
    metadata = pickle.loads((saved / ".metadata").read_bytes())
    records = {
        index: info
        for index, info in metadata.storage_data.items()
        if type(metadata.state_dict_metadata[index.fqn]).__name__ == "BytesStorageMetadata"
    }
    assert records
    buffer = io.BytesIO()
    torch.save(Hostile(tmp_path / "ran"), buffer)
    (saved / "__0_9.distcp").write_bytes(buffer.getvalue())
    for info in records.values():
        info.relative_path, info.offset, info.length = "__0_9.distcp", 0, len(buffer.getvalue())
    (saved / ".metadata").write_bytes(pickle.dumps(metadata))
    update_digests(saved)
    with pytest.raises(UserError, match="not a usable checkpoint"):
        trainable_model(layout).load(saved, with_optimizer=True)
    assert not (tmp_path / "ran").exists()


def test_unmodified_checkpoint_loads(layout, saved):  # noqa: F811
    assert trainable_model(layout).load(saved, with_optimizer=True) == {"step": 1, "updates": 1}
