"""The files of a model that is only known by its manifest: its blocks come from peers, one file each (see `ModelSource.add_file`)."""

from __future__ import annotations

import json
import uuid
from collections.abc import Collection, Mapping
from pathlib import Path

from petalnet.errors import ModelError
from petalnet.models.files import Files, LocalTensor, TensorInfo
from petalnet.models.manifest import Manifest


class SwarmFiles(Files):
    """What a manifest tells of a model's files.

    Attributes:
        manifest: the manifest.
    """

    def __init__(self, manifest: Manifest, folder: Path) -> None:
        """
        Args:
            folder: for the model's small files; made if need be.

        Raises:
            ModelError: the manifest does not say what its tensors are called.
        """
        self.manifest = manifest
        self._folder = folder
        self._tensors = {
            name: TensorInfo(dtype, shape, block.ranges[canonical][1] - block.ranges[canonical][0])
            for block in manifest.blocks
            for canonical, dtype, shape in block.tensors
            for name in (block.prefix + canonical,)
        }
        if len(self._tensors) != sum(len(block.tensors) for block in manifest.blocks):
            raise ModelError(f"the manifest of {manifest.name} calls several tensors the same")

    def file(self, name: str) -> Path | None:
        if name != "config.json":
            return None
        path = self._folder / name
        content = json.dumps(self.manifest.plain_config()).encode()
        try:
            if not path.exists() or path.read_bytes() != content:
                self._folder.mkdir(parents=True, exist_ok=True)
                temporary = self._folder / f".{name}-{uuid.uuid4().hex}"  # other nodes on this machine may be reading it
                try:
                    temporary.write_bytes(content)
                    temporary.replace(path)
                finally:
                    temporary.unlink(missing_ok=True)
        except OSError as error:
            reason = error.strerror or error
            raise ModelError(f"the configuration of {self.manifest.name} cannot be kept in {self._folder}: {reason}") from error
        return path

    def tensors(self) -> Mapping[str, TensorInfo]:
        return self._tensors

    def local(self, names: Collection[str]) -> Mapping[str, LocalTensor]:
        for name in names:
            raise ModelError(f"the tensor {name} of {self.manifest.name} is not here: it has to come from the servers of the swarm")
        return {}
